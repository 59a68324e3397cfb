"""A dataset that exists is itself, whatever characters its name has; only what does not exist is a pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.errors import DataError
from tests.data.streams import write_numbers
from tests.faults.test_credentials import tool

NAMES = ["a[1]", "b*", "c?", "@d", "[!e]", "f{1,2}", "g.bin", "h.idx", "i [1] j"]


@pytest.fixture
def folder(tmp_path):
    """Datasets with such names, of which each has its own numbers, and those that the names would match as globs."""
    for number, name in enumerate([*NAMES, "a1", "bx", "cx", "e", "x", "g", "h", "i 1 j"]):
        write_numbers(tmp_path / name, 50, start=1000 * number)
    return tmp_path


@pytest.mark.parametrize(("number", "name"), enumerate(NAMES))
def test_a_dataset_that_exists_is_itself(folder, number, name, monkeypatch, capsys):
    for word in (str(folder / name), f"{folder / name}.idx", f"{folder / name}.bin"):
        assert expand_prefixes(word) == (str(folder / name),)
        assert open_corpus(word).read(0, 50).tolist() == list(range(1000 * number, 1000 * number + 50))
    monkeypatch.chdir(folder)
    assert expand_prefixes(name) == (name,)
    (folder / "list").write_text(f"{name}\na1\n")
    # In a list, a line that begins with @ is a list only if no dataset has that name beside it.
    assert expand_prefixes("@list") == (name, "a1")
    assert tool("merge_datasets", ["--input", name, "--output-prefix", "out"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shards"] == 1
    assert Path("out.bin").read_bytes() == Path(f"{name}.bin").read_bytes()


def test_what_does_not_exist_is_a_pattern(folder):
    assert expand_prefixes(f"{folder}/[ae]1") == (f"{folder}/a1",)
    assert expand_prefixes(f"{folder}/[gh]") == (f"{folder}/g", f"{folder}/h")
    with pytest.raises(DataError, match="matches no dataset"):
        expand_prefixes(f"{folder}/z[1]")
    (folder / "y[1].bin").touch()
    assert expand_prefixes(f"{folder}/y[1]") == (f"{folder}/y[1]",), "one of its files is missing, which opening it says"
    with pytest.raises(DataError, match=r"y\[1\].idx does not exist"):
        open_corpus(f"{folder}/y[1]")
