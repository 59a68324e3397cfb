"""A wheel, installed where no checkout can be imported: the installed command runs everything from text to a report."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_build import ROOT, copy_checkout, hook

PLAN = [
    "--num-layers",
    "1",
    "--hidden-size",
    "16",
    "--num-attention-heads",
    "2",
    "--ffn-hidden-size",
    "32",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "4",
    "--global-batch-size",
    "8",
    "--patch-size",
    "2",
    "--patch-fraction",
    "0.5",
    "--train-tokens",
    "2048",
    "--lr",
    "1e-3",
    "--data-path",
    "my_text_document",
    "--split",
    "80,20,0",
    "--save",
    "run",
]


def use(home: Path, call: Callable[..., str]) -> None:
    """Uses the installed command as a newcomer does.

    Args:
        home: an empty folder, in which the commands run.
        call: runs the installed command with these arguments there and returns its standard output; with `error`, it ends with code 2 and
            says so.
    """
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "some", "dogs", "ran", "in", "an", "old", "park"]
    lines = (json.dumps({"text": " ".join(draw.choice(words) for _ in range(50))}) for _ in range(200))
    (home / "a.jsonl").write_text("\n".join(lines))
    assert "megatron_patch" in call("--version")
    call("plan", "--config", "examples/configs/llama_370m.yaml", error="run megatron-patch examples ., which writes it")
    call("examples", ".")
    assert "H100" in call("plan", "--config", "examples/configs/llama_370m.yaml", "--world-size", "8")
    call("train-tokenizer", "--input", "a.jsonl", "--vocab-size", "290", "--output", "tokenizer")
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer", "--append-eod")
    call("preprocess", "--input", "a.jsonl", "--output-prefix", "my", *kind)
    assert json.loads(call("inspect", "my_text_document", "--samples", "0"))["documents"] == 200
    call("pretrain", *PLAN)
    records = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["patch_size"] for record in records if record["type"] == "step"} == {1, 2}
    assert json.loads(call("inspect", "run", "--json"))["checkpoints"][0]["valid"]
    assert json.loads(call("evaluate", "--load", "run", "--data-path", "my_text_document").splitlines()[-1])["token_loss"] > 0
    assert call("generate", "--load", "run", "--prompt", "the cat", "--max-new-tokens", "4").startswith("the cat")
    call("report", "run", "--output", "run.html")
    assert "drawAll" in (home / "run.html").read_text()


def plain_loop(home: Path, python: str, **variables: str) -> None:
    """Runs the plain loop through its switch, stopped in the middle of a stage and resumed."""
    words = [python, "examples/integrations/plain_loop.py", "--save", "loop.pt", "--train-tokens", str(12 * 2048)]
    first, second = (run([*words, *more], home, **variables).splitlines() for more in (["--stop-after", "5"], []))
    records = [json.loads(line) for line in (*first, *second)]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["patch_size"] for record in records] == [4] * 8 + [1] * 4


def run(command: list[str], folder: Path, error: str = "", **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "DS_BUILD_OPS": "0", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if error else 0) and error in done.stderr, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def wheel(tmp_path) -> Path:
    (tmp_path / "checkout").mkdir()
    copy_checkout(tmp_path / "checkout")
    return hook(tmp_path / "checkout", "build_wheel", CXX="no-such-compiler")


def test_a_wheel_is_complete(tmp_path, wheel):
    target, home = tmp_path / "target", tmp_path / "home"
    home.mkdir()
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)], home)

    def call(*words: str, error: str = "") -> str:
        return run([str(target / "bin" / "megatron-patch"), *words], home, error, PYTHONPATH=str(target))

    where = run([sys.executable, "-c", "import megatron_patch; print(megatron_patch.__file__)"], home, PYTHONPATH=str(target))
    assert where.strip() == str(target / "megatron_patch" / "__init__.py")
    use(home, call)
    plain_loop(home, sys.executable, PYTHONPATH=str(target))
    # A launcher starts it by the name of the module.
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_patch.pretrain")
    run([sys.executable, *ranks, *PLAN, "--train-tokens", "1024", "--save", "two"], home, PYTHONPATH=str(target))
    assert (home / "two" / "latest").exists()


@pytest.mark.parametrize(
    ("launcher", "checkout", "words"),
    [
        ("srun", True, "python -u pretrain_gpt_patch.py --config c"),
        ("srun", False, "python -u -m megatron_patch.pretrain --config c"),
        ("deepspeed", True, "pretrain_gpt_patch.py --config c"),
        ("deepspeed", False, "--module megatron_patch.pretrain --config c"),
    ],
)
def test_the_slurm_templates_start_the_installed_package_where_there_is_no_checkout(tmp_path, launcher, checkout, words):
    for name in ("srun", "deepspeed", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (tmp_path / name).chmod(0o755)
    if checkout:
        (tmp_path / "pretrain_gpt_patch.py").touch()
    script = f"set -euo pipefail; source {ROOT}/examples/slurm/ranks.sh; start_ranks pretrain_gpt_patch.py --config c"
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "n1", "SAVE": "run"}
    variables = {**os.environ, **job, "LAUNCHER": launcher, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    started = done.stdout.splitlines()[-1]
    assert started.startswith(f"{launcher} ") and started.endswith(f" {words}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_environment_with_the_wheel_and_its_extra_train_runs_everything(tmp_path, wheel):
    """torch first, under the constraints; then WHEEL[train]."""
    home, venv = tmp_path / "home", tmp_path / "venv"
    home.mkdir()
    run([sys.executable, "-m", "venv", str(venv)], home)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    run([*pip, "--upgrade", "pip", "setuptools", "wheel"], home)
    try:
        run([*pip, f"{pin}+cpu"], home)
    except AssertionError:  # the index has no CPU build of its own name
        run([*pip, pin], home)
    program = [str(venv / "bin" / "megatron-patch")]
    run([*pip, str(wheel)], home)
    flags = ["--data-path", "x", "--vocab-size", "64", *PLAN[: PLAN.index("--data-path")]]
    run([*program, "pretrain", *flags], home, error="training needs DeepSpeed, which is not installed")
    run([*program, "examples", "."], home)
    plain_loop(home, str(venv / "bin" / "python"))
    for name in ("examples", "constraints.txt"):
        shutil.move(home / name, tmp_path / name)
    run([*pip, f"{wheel}[train]"], home)
    use(home, lambda *words, error="": run([*program, *words], home, error))
