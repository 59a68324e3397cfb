"""Each row of the table of threats in docs/operations.md."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_patch.checkpoint import commit as files
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.from_megatron import from_megatron
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.convert.tokenizer_files import copy_tokenizer
from megatron_patch.convert.weight_files import open_weights
from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.engine.fragments import Fragment
from megatron_patch.engine.state_files import StateFiles, state_file_name, write_fragments
from megatron_patch.errors import CheckpointError, ConfigError, DataError
from megatron_patch.evaluation.harness import _local_datasets_first
from megatron_patch.raw_text.inputs import FileRange, expand
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.tokenizers.base import encode, load_tokenizer
from tests.checkpoint.test_commit import STATE, save
from tests.convert.models import LLAMA, make_checkpoint
from tests.distributed.runs import DATA, MODEL, ROOT, command, make_corpus, start_program
from tests.faults.conftest import PLAN

SOURCES = sorted([*(ROOT / "megatron_patch").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt_patch.py"])


FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "builtins.eval", "builtins.exec", "input"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "torch.jit.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load", "np.loadtxt"),
    *("shutil.unpack_archive", "shutil.make_archive", "tempfile.mktemp", "np.frompyfunc"),
}
FORBIDDEN_MODULES = ("subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "pty.", "tarfile.", "zipfile.", "shelve.", "runpy.", "jinja2.")


def calls(source: Path) -> list[tuple[str, set[str]]]:
    """Returns (what is called, the names of its keywords) of each call in a file."""
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), {keyword.arg or "**" for keyword in call.keywords}) for call in found]


def test_the_program_cannot_run_code_that_it_reads():
    """Nothing starts a program, except a study its own runs; nothing evaluates text, unpickles objects or unpacks archives; PyTorch files
    are opened with weights_only, YAML by the safe loader, and no file of numpy, which may contain pickles, is read.
    """
    for source in SOURCES:
        starts_runs = {"subprocess"} if source.parent.name == "replication" else set()
        for name, keywords in calls(source):
            forbidden = name in FORBIDDEN or (name.startswith(FORBIDDEN_MODULES) and name.partition(".")[0] not in starts_runs)
            assert not forbidden, f"{source}: {name}"
            assert "shell" not in keywords, f"{source}: {name}"
            assert name != "torch.load" or "weights_only" in keywords, source
            assert not name.endswith(".from_pretrained") or "trust_remote_code" in keywords, source
        imported = {alias.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Import) for alias in node.names}
        assert (
            not imported & {"subprocess", "tarfile", "zipfile", "shelve", "marshal", "jinja2", "cloudpickle", "joblib", "pty"} - starts_runs
        ), source


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
        "num_layers: !!python/name:os.system",
        "num_layers: !!python/module:os",
        "!!python/object/apply:subprocess.check_output [['touch', 'MARK']]: 1",
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


def write_pickle(path: Path, value: object, legacy: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


INDEX = json.dumps({"metadata": {}, "weight_map": {"weight": "pytorch_model-00001-of-00001.bin"}})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("source", ["one file", "several files", "deepspeed module", "megatron", "megatron release"])
def test_every_file_of_pickles_is_refused_by_the_name_of_what_it_would_call(tmp_path, source, legacy):
    """DeepSpeed's zero_to_fp32.py writes the first three, Megatron-LM the others."""
    bomb, folder = Bomb(tmp_path / "ran"), tmp_path / "in"
    if source.startswith("megatron"):
        inner = folder / "release" / "mp_rank_00" if source.endswith("release") else folder / "mp_rank_00"
        write_pickle(inner / "model_optim_rng.pt", {"model": {}, "args": bomb, "checkpoint_version": 3.0}, legacy)
        if source.endswith("release"):
            (folder / "latest_checkpointed_iteration.txt").write_text("release")
    elif source == "several files":
        write_pickle(folder / "pytorch_model-00001-of-00001.bin", {"weight": torch.ones(2), "x": bomb}, legacy)
        (folder / "pytorch_model.bin.index.json").write_text(INDEX)
    else:
        value = {"weight": torch.ones(2), "x": bomb}
        write_pickle(folder / "pytorch_model.bin", value if source == "one file" else {"module": value}, legacy)
    with pytest.raises(CheckpointError) as error:
        if source.startswith("megatron"):
            from_megatron(folder, tmp_path / "out")
        else:
            open_weights(folder)
    what, allowed, do = str(error.value).split("\n")
    assert what.endswith("contains more than tensors and plain values: posix.system") and str(folder) in what
    assert allowed.strip() == "Allowed: a file of tensors, which cannot run code when it is loaded"
    assert do.strip() == "What to do: if you trust the file, load it elsewhere and save its weights as safetensors"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["../elsewhere", "/etc", "..", ".", "", "\u00b2", "9" * 5000])
def test_megatron_s_tracker_names_a_folder_inside(tmp_path, text):
    write_pickle(tmp_path / "elsewhere" / "mp_rank_00" / "model_optim_rng.pt", {"x": 1})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError):
        from_megatron(tmp_path / "in", tmp_path / "out")


def test_code_beside_a_model_is_neither_run_nor_copied(tmp_path):
    """config.json names classes of modeling_x.py, with which transformers would load the model if it were told to trust the folder."""
    folder, output = tmp_path / "in", tmp_path / "out"
    to_hugging_face(open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", LLAMA))), folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    names = {"AutoConfig": "configuration_x.T", "AutoModelForCausalLM": "modeling_x.T", "AutoTokenizer": ["tokenization_x.T", None]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names, "trust_remote_code": True}))
    from_hugging_face(folder, output)
    assert not (tmp_path / "ran").exists() and not list(output.rglob("*.py"))
    assert "auto_map" not in "".join(path.read_text(errors="replace") for path in output.rglob("*.json"))


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"])
@pytest.mark.parametrize("content", ["pickle", "zip", "yaml"])
def test_a_tokenizer_s_file_cannot_run_code(tmp_path, kind, content):
    path = tmp_path / "tokenizer.json"
    if content == "yaml":
        path.write_text(f"!!python/object/apply:os.system ['touch {tmp_path / 'ran'}']")
    elif content == "zip":
        write_pickle(path, {"x": Bomb(tmp_path / "ran")})
    else:
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    options = {"tiktoken_pattern": "gpt2"} if kind == "TikTokenizer" else {}
    with pytest.raises((DataError, ConfigError)):
        load_tokenizer(kind, str(path), **options)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_no_index_of_a_dataset(tmp_path):
    """Old versions of Megatron-LM kept the index of samples in .npy files, which may contain pickles; no .npy file is read here."""
    (tmp_path / "x.bin").write_bytes(bytes(8))
    (tmp_path / "x.idx").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"x\.idx"):
        IndexedDataset(str(tmp_path / "x"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["script", "pickle", "numpy"])
def test_the_data_of_a_task_cannot_run_code(tmp_path, monkeypatch, kind):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data" / "owner" / "set"
    folder.mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if kind == "script":
        (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    elif kind == "pickle":
        (folder / "test.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    else:
        np.save(folder / "test.npy", np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with _local_datasets_first(tmp_path / "data"), pytest.raises(DataError, match="cannot read task data owner/set"):
        datasets.load_dataset("owner/set")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.tgz", "a.7z", "a.jsonl.zip", "a.jsonl.tar.xz", "a.parquet.gz"])
def test_archives_are_not_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="unsupported suffix"):
        expand([str(tmp_path / name)])


def test_an_archive_under_another_name_is_text_that_is_left_out(tmp_path):
    """Its members would have names and links that lead elsewhere."""
    with tarfile.open(tmp_path / "a.jsonl.gz", "w:gz") as archive:
        for name, kind, target in (
            ("../up", tarfile.REGTYPE, ""),
            (str(tmp_path / "absolute"), tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "/etc"),
            ("link/x", tarfile.REGTYPE, ""),
            ("device", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 0
            archive.addfile(member, io.BytesIO())
    before = sorted(tmp_path.parent.rglob("*"))
    (batch,) = read_batches([FileRange(str(tmp_path / "a.jsonl.gz"))])
    parsed = parse_batch(batch, ("text",))
    assert parsed.columns == ([],) and len(parsed.bad) == 1
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "address",
    [
        "https://TOKEN@host/web",
        "https://user:TOKEN@host/web",
        "https://host/web?sig=TOKEN",
        "s3://key:TOKEN@bucket/web",
        "sftp://user:TOKEN@host/web",
        "@https://user:TOKEN@host/list.txt",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(tmp_path, address, capsys):
    """The message goes to the console and to SAVE/events.jsonl."""
    save = tmp_path / "run"
    code = start_program([*MODEL, *DATA, *PLAN, "--data-path", address.replace("TOKEN", "sesame-1d7c"), "--save", str(save)])
    output = "".join(capsys.readouterr())
    assert code == 3 and "a password, a token or a query" in output and "AWS_ACCESS_KEY_ID" in output
    assert "sesame" not in output + "".join(path.read_text() for path in save.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "address",
    [
        "reference://web::file:///tmp/refs.json",
        "zip://web::https://host/a.zip",
        "simplecache::s3://bucket/web",
        "reference://refs.json",
        "dask://x/web",
        "jupyter://host/web",
    ],
)
def test_addresses_that_interpret_other_files_are_refused(address):
    """Versions of fsspec that are allowed here render templates in the description of reference:// without a sandbox."""
    with pytest.raises(DataError, match="does not name a file on a server"):
        open_corpus(address)


SECRETS = {
    "WANDB_API_KEY": "wandb-7f3a9c5511d2",
    "HF_TOKEN": "hf_9b1d77aa02e4",
    "AWS_SECRET_ACCESS_KEY": "aws-55d1c0ffee20",
    "AWS_SESSION_TOKEN": "session-81b2a90cc3f1",
    "GOOGLE_API_KEY": "google-2f60c4b1d9e8",
    "HTTPS_PROXY": "http://proxy-user:proxy-66e0f1@127.0.0.1:9",
}
COMMANDS = "\x1b]0;title [bold]x[/bold] \x1b[2J"
"""Commands for a terminal, and markup of rich."""


def test_secrets_in_the_environment_are_not_written_and_no_value_reaches_a_shell(tmp_path):
    """A run with tokens in its environment and commands in its flags: neither files nor output hold the tokens, nothing was run."""
    corpus = make_corpus(tmp_path / f"walks $(touch ran-1) ; touch ran-2 {COMMANDS}")
    folder = tmp_path / f"run `touch ran-3` {COMMANDS}"
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
    output = (done.stdout + done.stderr).decode()
    assert "\x1b" not in output and "\\x1b]0;title [bold]x[/bold] \\x1b[2J" in output
