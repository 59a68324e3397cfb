"""A dataset that exists is itself, whatever characters its name has; only what does not exist is a pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_patch.config.parsing import parse
from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.errors import ConfigError, DataError
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a\0b", r"line 3: 'a\\x00b' has a null character"),
        ("@a\0b", r"line 3: .* has a null character"),
        ("[" * 200_000, r"line 3: \[{100}…\[{99} is too long for a path"),
        ("/" * 5000 + "*", "line 3: .*is too long"),
        ("0.5 a1", r"line 3: 0\.5 a1 begins with a weight\n.*without weights.*\n.*--data-path 0\.7 @web\.txt"),
        ("1e-1\ta*", "line 3: .* begins with a weight"),
        ("30", "line 3: 30 begins with a weight"),
    ],
)
def test_a_line_that_is_no_prefix_is_named(folder, line, words, monkeypatch, capsys):
    (folder / "list").write_text(f"# shards\na1\n{line}\n")
    with pytest.raises(DataError, match=words):
        expand_prefixes(f"@{folder}/list")
    assert tool("merge_datasets", ["--input", f"@{folder}/list", "--output-prefix", f"{folder}/out"], monkeypatch) == 3
    output = capsys.readouterr().err
    assert "line 3: " in output and "Traceback" not in output and len(output) < 2000


def test_a_list_may_name_lists_but_not_itself(folder):
    for number in range(60):
        (folder / f"l{number}").write_text(f"@l{number + 1}\na1\n")
    (folder / "l40").write_text("@l41\n@l41\n")
    (folder / "l41").write_text("x\n")
    assert expand_prefixes(f"@{folder}/l0") == (*[f"{folder}/x"] * 2, *[f"{folder}/a1"] * 40)
    (folder / "l41").write_text("a1\n@./l39\n")
    with pytest.raises(DataError, match=r"l39 lists itself\n"):
        expand_prefixes(f"@{folder}/l0")
    (folder / "l41").write_text("@l42\n")
    with pytest.raises(DataError, match=r"l50 is in more than 50 lists"):
        expand_prefixes(f"@{folder}/l0")


def test_a_dataset_may_have_the_name_of_a_weight(folder):
    for name in ("30", "0.5 x"):
        write_numbers(folder / name, 50)
    (folder / "list").write_text("30\n0.5 x\n0.5 ?\n")
    assert expand_prefixes(f"@{folder}/list") == (f"{folder}/30", f"{folder}/0.5 x", f"{folder}/0.5 x")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lists_and_configurations_in_other_encodings_are_named(folder, encoding):
    (folder / "list").write_text("# all shards\na1\n", encoding)
    with pytest.raises(DataError, match=r"looks like UTF-\d\d \w+ endian\n.*UTF-8.*\n.*iconv -f UTF-"):
        expand_prefixes(f"@{folder}/list")
    (folder / "c.yaml").write_text("num_layers: 2\n", encoding)
    with pytest.raises(ConfigError, match=r"c\.yaml looks like UTF-\d\d \w+ endian\n.*UTF-8.*\n.*iconv -f UTF-"):
        parse(["--config", f"{folder}/c.yaml"])
