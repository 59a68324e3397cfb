"""The installed command: its subcommands, its errors, what it imports, and that each subcommand shows the command that was called."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch import __version__, programs
from megatron_patch.cli import inspect, program
from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.cli.program import SUBCOMMANDS, main
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from tests.distributed.runs import make_corpus

ROOT = Path(__file__).parent.parent.parent
REFUSES = """
import importlib.abc, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuses())
"""


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    return subprocess.run([sys.executable, *words], cwd=ROOT.parent, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def restore_command(monkeypatch):
    monkeypatch.setattr(programs, "_called", [])


def test_help_lists_every_subcommand_and_imports_neither_torch_nor_a_requirement():
    refused = ("torch", "deepspeed", "numpy", "rich", "tyro", "yaml")
    done = python("-c", REFUSES.format(refused=refused) + "from megatron_patch.cli.program import main; sys.exit(main(['--help']))")
    assert done.returncode == 0, done.stderr
    for subcommand in SUBCOMMANDS:
        assert f"  {subcommand.name} " in done.stdout and subcommand.summary in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version_names_the_packages_that_matter(capsys, monkeypatch):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"megatron_patch {__version__}" and [line.split()[0] for line in lines[1:]] == ["torch", "deepspeed", "Python"]

    def missing(package):
        raise program.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(program.importlib.metadata, "version", missing)
    assert main(["--version"]) == 0 and "deepspeed: not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what", "do"),
    [
        (["pretrian"], "megatron-patch has no subcommand 'pretrian'", "did you mean pretrain?"),
        (["Reprot"], "megatron-patch has no subcommand 'Reprot'", "did you mean report"),
        (["xyzzy"], "megatron-patch has no subcommand 'xyzzy'", "choose one of them; see megatron-patch --help"),
        (["--config", "a"], "--config precedes the subcommand", "megatron-patch pretrain --config …"),
    ],
)
def test_an_unknown_subcommand_is_an_error_in_three_parts(capsys, words, what, do):
    assert main(words) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"ConfigError: {what}" and shown[1].startswith("  Allowed: ") and do in shown[2] and len(shown) == 3


def test_a_python_without_the_requirements_gets_one_error_and_no_traceback():
    """`-S` leaves out site-packages."""
    done = python("-S", "-m", "megatron_patch", "plan", "--help")
    what, allowed, do = done.stderr.splitlines()
    assert done.returncode == 2 and "required packages: torch, numpy, tyro" in what and "all required" in allowed and "activate" in do
    assert python("-S", "-m", "megatron_patch", "--help").returncode == 0


def test_without_a_subcommand_it_prints_the_help_as_an_error(capsys):
    assert main([]) == 2
    assert "usage: megatron-patch SUBCOMMAND" in capsys.readouterr().err


def test_every_subcommand_has_a_module_and_every_tool_a_subcommand():
    for subcommand in SUBCOMMANDS:
        assert importlib.util.find_spec(subcommand.module) is not None, subcommand.module
    names = {subcommand.name for subcommand in SUBCOMMANDS}
    assert set(programs.TOOLS.values()) <= names
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"package_check"}
    assert tools <= set(programs.TOOLS)


@pytest.mark.parametrize("name", [subcommand.name for subcommand in SUBCOMMANDS if subcommand.name != "pretrain"])
def test_help_fits_into_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megatron-patch"])
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    # argparse does not break groups of flags of which one is required.
    assert [line for line in text.splitlines() if len(line) > 80 and not line.lstrip().startswith("(--")] == []


def test_help_of_a_subcommand_shows_the_command_that_was_called(capsys):
    for name in ("plan", "evaluate", "convert", "report", "study", "inspect"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert f"usage: megatron-patch {name} " in shown and "tools/" not in shown and "python " not in shown
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert "usage: megatron-patch pretrain " in capsys.readouterr().out


TEXT = """python tools/evaluate.py --load X
deepspeed --num_gpus 2 tools/evaluate.py --y
python examples/replicate/study.py
the flags of pretrain_gpt_patch.py, or deepspeed pretrain_gpt_patch.py
compare them (tools/inspect_dataset.py --diff); /home/me/tools/plan.py and report.py are yours"""
INSTALLED = """NAME evaluate --load X
deepspeed --num_gpus 2 --module megatron_patch evaluate --y
NAME study
the flags of NAME pretrain, or deepspeed --module megatron_patch.pretrain
compare them (NAME inspect-dataset --diff); /home/me/tools/plan.py and report.py are yours"""


def test_help_and_advice_name_the_programs_as_the_user_calls_them(monkeypatch):
    assert ArgumentParser(description=TEXT).description == TEXT == ConfigError("x", TEXT).allowed
    programs.set_command("python -m megatron_patch evaluate")
    assert ArgumentParser(description=TEXT).description == INSTALLED.replace("NAME", "python -m megatron_patch")
    monkeypatch.setattr(programs, "_called", [])
    monkeypatch.setattr(programs, "HOME", ROOT / "docs")
    installed = INSTALLED.replace("NAME", "megatron-patch")
    error = ConfigError(TEXT, TEXT, TEXT)
    assert (error.what, error.allowed, error.do) == (TEXT, installed, installed)
    assert "megatron-patch inspect-checkpoint shows which checkpoints are valid" in ExitCode.CHECKPOINT.advice
    assert programs.how_to_get("examples/configs/none.yaml") is None
    assert programs.shipped("constraints.txt") == ROOT / "docs" / "megatron_patch" / "share" / "constraints.txt"


def test_the_rank_that_deepspeed_adds_is_accepted_before_the_subcommand(capsys):
    assert main(["--local_rank=1", "pretrian"]) == 2
    assert "'pretrian'" in capsys.readouterr().err


def test_inspect_decides_by_what_it_is_given(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "walks")
    assert main(["inspect", "--samples", "0", corpus]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    run = ROOT / "tests" / "distributed" / "written_by_0_1" / "run"
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["valid"]
    for words, error in (
        ([corpus, "--verify"], f"--verify does not apply to {corpus}, which is a dataset"),
        ([str(run), "--check"], f"--check does not apply to {run}, which is a folder of checkpoints"),
        ([str(tmp_path / "none")], "is neither a dataset nor a folder"),
    ):
        with pytest.raises(ConfigError, match=error):
            inspect.main(words)


def test_examples_are_copied_once_and_never_over_other_files(tmp_path, capsys):
    assert main(["examples", str(tmp_path / "new")]) == 0 and main(["examples", str(tmp_path / "new")]) == 0
    for name in (
        "constraints.txt",
        "examples/configs/llama_70b.yaml",
        "examples/replicate/study_cpu.yaml",
        "examples/slurm/ranks.sh",
        "examples/integrations/plain_loop.py",
    ):
        assert (tmp_path / "new" / name).read_bytes() == (ROOT / name).read_bytes()
    (tmp_path / "new" / "constraints.txt").write_text("mine")
    assert main(["examples", str(tmp_path / "new")]) == 2
    assert "constraints.txt exists and is different" in capsys.readouterr().err and (tmp_path / "new/constraints.txt").read_text() == "mine"


WITHOUT_DEEPSPEED = """
import json, pkgutil, importlib, megatron_patch
for module in pkgutil.walk_packages(megatron_patch.__path__, "megatron_patch."):
    if not module.name.startswith("megatron_patch._") and not module.name.endswith(("__main__", "harness_model", "pipeline_parallel")):
        importlib.import_module(module.name)
from megatron_patch.cli.program import main
for words in json.loads(sys.argv[1]):
    print("code", main(words), flush=True)
"""


def test_only_training_needs_deepspeed(tmp_path):
    """Every module is imported where the package is refused; then a run is planned, a checkpoint is evaluated, and a run is started."""
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16 --train-tokens 64k --lr 1e-3"
    flags += " --global-batch-size 8 --micro-batch-size 1"
    corpus, run = make_corpus(tmp_path / "walks", documents=4), ROOT / "tests" / "distributed" / "written_by_0_1" / "run"
    commands = [
        ["plan", "--world-size", "1", *flags.split()],
        ["pretrain", *flags.split(), "--dry-run"],
        ["evaluate", "--load", str(run), "--data-path", corpus],
        ["pretrain", *flags.split(), "--data-path", corpus],
    ]
    done = python("-c", REFUSES.format(refused=("deepspeed",)) + WITHOUT_DEEPSPEED, json.dumps(commands))
    assert [line for line in done.stdout.splitlines() if line.startswith("code ")] == ["code 0", "code 0", "code 0", "code 2"], done.stderr
    assert '"token_loss": ' in done.stdout and "training needs DeepSpeed, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("subcommand", ["plan", "schema", "completion", "examples"])
def test_the_prose_of_a_help_fits_into_the_terminal(subcommand, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main([subcommand, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.lstrip().startswith("[")] == []
    if subcommand == "completion":
        assert "zsh:   source <(megatron-patch completion zsh)" in lines, "commands keep their lines"
