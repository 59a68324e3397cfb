"""Each row of the table of threats in docs/operations.md."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_patch.checkpoint import commit as files
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.convert.tokenizer_files import copy_tokenizer
from megatron_patch.convert.weight_files import open_weights
from megatron_patch.engine.fragments import Fragment
from megatron_patch.engine.state_files import StateFiles, state_file_name, write_fragments
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.tokenizers.base import encode, load_tokenizer
from tests.checkpoint.test_commit import STATE, save
from tests.distributed.runs import DATA, MODEL, ROOT, command, make_corpus
from tests.faults.conftest import PLAN

SOURCES = sorted([*(ROOT / "megatron_patch").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt_patch.py"])


def calls(source: Path) -> list[tuple[str, set[str]]]:
    """Returns (what is called, the names of its keywords) of each call in a file."""
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), {keyword.arg or "**" for keyword in call.keywords}) for call in found]


def test_the_program_cannot_run_code_that_it_reads():
    """Nothing starts a shell, evaluates text or unpickles objects; PyTorch files are opened with weights_only, YAML by the safe loader."""
    forbidden = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    for source in SOURCES:
        for name, keywords in calls(source):
            assert name not in forbidden and not name.startswith("subprocess."), f"{source}: {name}"
            assert "shell" not in keywords, f"{source}: {name}"
            assert name != "torch.load" or "weights_only" in keywords, source
            assert not name.endswith(".from_pretrained") or "trust_remote_code" in keywords, source


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pytorch_file_cannot_run_code(tmp_path):
    torch.save({"weight": torch.ones(2), "bomb": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        open_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_holds_nothing_but_safetensors_and_json(undisturbed):
    for folder in files.list_checkpoints(undisturbed.folder):
        names = sorted(path.name for path in folder.iterdir())
        assert all(name.endswith((".safetensors", ".json")) for name in names)
        for path in folder.glob("*.json"):
            json.loads(path.read_text())


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "inner/../../secret", "", "a\0b"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    target = save(tmp_path, 3)
    files.write_manifest(target, {**files.read_manifest(target), name: files.ManifestEntry(1, "0")})
    with pytest.raises(CheckpointError, match="inside"):
        files.read_manifest(target)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        files.find_newest_valid(tmp_path)


def test_a_link_inside_a_checkpoint_cannot_lead_outside(tmp_path):
    target = save(tmp_path / "run", 3)
    shutil.move(target / "part-0.bin", tmp_path / "elsewhere")
    (target / "part-0.bin").symlink_to(tmp_path / "elsewhere")
    assert "names the file 'part-0.bin'" in files.verify(target)[0]


def _with_weights(folder: Path) -> Path:
    target = files.prepare(folder, 3)
    tensors = {kind: torch.ones(6) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    entries = write_fragments(target, 0, 1, [Fragment("a", (6,), None, 0, 6, tensors)]) | files.write_state(target, STATE)
    files.write_manifest(target, entries)
    return files.publish(target)


def test_weights_that_are_not_in_the_manifest_are_not_read(tmp_path):
    target = _with_weights(tmp_path)
    assert files.verify(target) == []
    shutil.copy(target / state_file_name(0, 1), target / state_file_name(1, 2))
    assert files.verify(target) == ["state-00001-of-00002.safetensors is not in the manifest"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"numel\\": 6', b'\\"numel\\": 9'),
        (b'\\"shape\\": [6]', b'\\"shape\\": [9]'),
        (b'"shape":[6]', b'"shape":[9]'),
        (b'\\"start\\": 0', b'\\"start\\": 1'),
    ],
)
def test_forged_sizes_are_refused(tmp_path, old, new):
    target = _with_weights(tmp_path)
    path = target / state_file_name(0, 1)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(CheckpointError):
        StateFiles(target).read("weight", "a")


@pytest.mark.parametrize(
    "text",
    [
        "num_layers: !!python/object/apply:os.system ['touch MARK']",
        "num_layers: !!python/object/new:subprocess.Popen [['touch', 'MARK']]",
        "stages: '[!!python/object/apply:os.system [touch MARK]]'",
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"k{i}: &a [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n" for i in range(30)),
        "stages: &a [*a]",
        "num_layers: " + "[" * 100_000,
    ],
)
def test_a_configuration_file_cannot_run_code_nor_fill_the_memory(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text.replace("MARK", str(tmp_path / "ran")))
    with pytest.raises(ConfigError):
        resolve(parse([f"--config={tmp_path / 'c.yaml'}", *MODEL, "--train-tokens", "1M", "--global-batch-size", "2", "--dry-run"]), 1)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_folder_cannot_run_code(tmp_path):
    """The folder has code and the settings with which transformers would run it: it is neither run nor copied."""
    folder, target = tmp_path / "tokenizer", tmp_path / "export"
    folder.mkdir()
    target.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n"
    (folder / "tokenization_x.py").write_text(code)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}, "eos_token": "<eos>", "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert encode(load_tokenizer("HuggingFaceTokenizer", str(folder)), "a") == [0]
    copy_tokenizer({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}, target)
    assert not (tmp_path / "ran").exists() and not list(target.glob("*.py"))


SECRETS = {"WANDB_API_KEY": "wandb-7f3a9c5511d2", "HF_TOKEN": "hf_9b1d77aa02e4"}


def test_secrets_in_the_environment_are_not_written_and_no_value_reaches_a_shell(tmp_path):
    """A run with tokens in its environment and commands in its flags: neither files nor output hold the tokens, nothing was run."""
    corpus = make_corpus(tmp_path / "walks $(touch ran-1) ; touch ran-2")
    folder = tmp_path / "run `touch ran-3`"
    words = command(
        MODEL, DATA, PLAN, ["--tensorboard-dir", str(tmp_path / "$(touch ran-4)"), "--data-path", corpus, "--save", str(folder)]
    )
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt_patch.py"), *words], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert files.find_newest_valid(folder) is not None
    assert not list(tmp_path.rglob("ran-*"))
    contents = [done.stdout, done.stderr, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert len(contents) > 10
    assert not [secret for secret in SECRETS.values() for content in contents if secret.encode() in content]
