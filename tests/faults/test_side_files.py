"""Files that may be missing: only what does not exist counts as missing. What cannot be read is an error or a note that names it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.from_megatron import find_file
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.convert.weight_files import load_torch_file, open_weights
from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.errors import CheckpointError, DataError
from megatron_patch.reporting.history import read_history
from megatron_patch.utils.files import MOST_SKIPPED, optional_file
from tests.convert.models import make_checkpoint, make_tokenizer
from tests.data.streams import write_numbers
from tests.distributed.runs import DATA, MODEL, ROOT, start_program
from tests.faults.conftest import PLAN
from tests.faults.test_credentials import tool
from tests.faults.test_small_files import sparse
from tests.model.shapes import LLAMA

KINDS = {
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
}
WORDS = "it is not a file|it is a link to a file that does not exist"


def replace(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    KINDS[kind](path)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_cannot_be_read_is_no_missing_metadata(tmp_path, kind, monkeypatch, capsys):
    prefix = write_numbers(tmp_path / "x", 500)
    assert read_metadata(prefix) is None and not optional_file(f"{prefix}.json")
    replace(tmp_path / "x.json", kind)
    with pytest.raises(DataError, match=WORDS):
        read_metadata(prefix)
    train = [*MODEL, *DATA, *PLAN, "--vocab-size", "600", "--data-path", prefix, "--save", str(tmp_path / "run")]
    for program in (
        lambda: tool("merge_datasets", ["--input", prefix, "--output-prefix", f"{prefix}2"], monkeypatch),
        lambda: tool("inspect_dataset", [prefix], monkeypatch),
        lambda: start_program(train),
    ):
        code = program()
        output = " ".join("".join(capsys.readouterr()).split())
        assert code == 3 and f"{prefix}.json: it is" in output and "check --data-path" not in output and "Traceback" not in output, output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_what_takes_the_place_of_a_dataset_is_named(tmp_path, kind, suffix):
    prefix = write_numbers(tmp_path / "x", 50)
    replace(tmp_path / f"x{suffix}", kind)
    with pytest.raises(DataError, match=WORDS):
        open_corpus(prefix)


def test_a_folder_at_an_address_is_no_missing_file():
    files = fsspec.filesystem("memory")
    files.makedirs("/side/x.json", exist_ok=True)
    try:
        with pytest.raises(DataError, match="memory://side/x.json: it is not a file"):
            read_metadata("memory://side/x")
    finally:
        files.rm("/side", recursive=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_named(tmp_path, kind, name):
    replace(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match=rf"{name}: (?:{WORDS})"):
        open_weights(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "model_optim_rng.pt"])
def test_files_of_megatron_that_cannot_be_read_are_named(tmp_path, kind, name):
    replace(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match=rf"{name}: (?:{WORDS})"):
        find_file(tmp_path)


def test_a_file_that_is_not_pytorchs_gets_no_advice_to_run_its_code(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "whole")
    for number, content in enumerate([bytes(1000), b"text", (tmp_path / "whole").read_bytes()[:300], b"", None]):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content) if content is not None else sparse(path)
        with pytest.raises(CheckpointError) as caught:
            load_torch_file(path)
        assert "is damaged, or contains more than tensors" in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model in Hugging Face's format with a tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    shape = dataclasses.replace(LLAMA, vocab_size=400, padded_vocab_size=512)
    to_hugging_face(open_checkpoint(str(make_checkpoint(folder / "ckpt", shape))), folder / "hf")
    make_tokenizer(folder / "tokenizer", 300)
    shutil.copyfile(folder / "tokenizer" / "tokenizer.json", folder / "hf" / "tokenizer.json")
    return folder / "hf"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"], KINDS),
        *itertools.product(["tokenizer.json", "tokenizer_config.json"], ["sparse"]),
    ],
)
def test_an_import_says_why_it_takes_no_tokenizer(exported, tmp_path, kind, name, monkeypatch, capsys):
    source = tmp_path / "hf"
    shutil.copytree(exported, source)
    if kind == "sparse":
        sparse(source / name)
    else:
        replace(source / name, kind)
    assert tool("convert_checkpoint", ["from-hf", "--input", str(source), "--output", str(tmp_path / "out")], monkeypatch) == 0
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert result["tokenizer"] is None and re.search(rf"{source / name} .*: it (is|has)", result["tokenizer_problem"])
    assert "The tokenizer was not imported: " in output.err and not (tmp_path / "out" / "tokenizer").exists()


def test_an_import_without_a_problem_tells_none(exported, tmp_path):
    done = from_hugging_face(exported, tmp_path / "with")
    assert done.tokenizer_type == "HuggingFaceTokenizer" and done.tokenizer_problem is None
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    done = from_hugging_face(tmp_path / "hf", tmp_path / "without")
    assert done.tokenizer_type is None and done.tokenizer_problem is None


def damaged_run(folder: Path) -> Path:
    shutil.copytree(ROOT / "tests/distributed/written_by_0_1/run", folder)
    return folder


def zeros(path: Path, size: int = 1 << 37) -> None:
    """Appends a line of zeros that takes no space."""
    with path.open("ab") as file:
        file.truncate((path.stat().st_size if path.exists() else 0) + size)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_line_without_an_end_ends_the_reading(tmp_path, name, monkeypatch, capsys):
    """Such a file takes minutes to read, and a line in it no memory."""
    run = damaged_run(tmp_path / "run")
    known = read_history(run)
    zeros(run / name)
    history = read_history(run)
    assert history.steps == known.steps and history.events == known.events
    assert [note for note in history.notes if "a line has more than" in note and name in note and "the rest of the file" in note]
    assert tool("report", [str(run), "--output", str(tmp_path / "report.html")], monkeypatch) == 0
    assert tool("show_step", [str(run)], monkeypatch) == 3
    (run / name).unlink()
    zeros(run / name)
    if name == "metrics.jsonl":
        for words in (["report", str(run), "--output", str(tmp_path / "report.html")], ["plot", str(run)]):
            assert tool(words[0], words[1:], monkeypatch) == 3
            assert f"a line has more than {MOST_SKIPPED:,} bytes" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_files_of_a_run_that_cannot_be_read_are_named(tmp_path, name, kind, monkeypatch, capsys):
    run = damaged_run(tmp_path / "run")
    replace(run / name, kind)
    words = ["show_step", str(run)] if name == "events.jsonl" else ["plot", str(run)]
    assert tool(words[0], words[1:], monkeypatch) == 3
    assert f"{name}: it is " in " ".join(capsys.readouterr().err.split())
    if name == "events.jsonl":
        assert any("events.jsonl cannot be read: it is" in note for note in read_history(run).notes)
