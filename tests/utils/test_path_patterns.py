"""A path that exists is that path, whatever characters it has; other text may be a glob."""

from __future__ import annotations

import glob

import pytest

from megatron_patch.utils.path_patterns import expand_local

NAMES = ["a[1].jsonl", "a1.jsonl", "*.jsonl", "b?.txt", "bc.txt", "g[1]/x.txt", "g1/x.txt", "g1/y.txt", "g1/z[2]/y.txt", "[!a]/deep/q.txt"]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", [*NAMES, "g[1]", "g1"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_exists_is_itself(folder, name, relative, monkeypatch):
    monkeypatch.chdir(folder)
    path = name if relative else f"{folder}/{name}"
    assert expand_local(path) == [path]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a[12].jsonl", ["a1.jsonl"]),
        ("a*.jsonl", ["a1.jsonl", "a[1].jsonl"]),
        ("*c.txt", ["bc.txt"]),
        ("g[1]/*.txt", ["g[1]/x.txt"]),
        ("./g[1]//*.txt", ["./g[1]/x.txt"]),
        ("g[1]/[y].txt", ["g1/y.txt"]),
        ("g1/z[2]/*.txt", ["g1/z[2]/y.txt"]),
        ("g?/x.txt", ["g1/x.txt"]),
        ("**/q.txt", ["[!a]/deep/q.txt"]),
        ("[!a]/**/*.txt", ["[!a]/deep/q.txt"]),
        ("nothing", []),
        ("nothing*", []),
        ("a\0*", []),
        ("a\0", []),
        ("", []),
        ("[" * 200_000, []),
        ("*/" * 100_000, []),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_globs(folder, pattern, expected, relative, monkeypatch):
    monkeypatch.chdir(folder)
    begin = "" if relative or not pattern else f"{glob.escape(str(folder))}/"
    found = [path.replace(f"{folder}/", "").replace("//", "/") for path in expand_local(begin + pattern)]
    assert found == expected


@pytest.mark.parametrize(
    ("repeated", "once"), [("**/" * 1300, "**/"), ("g1/" + "**//" * 40 + "*.txt", "g1/**/*.txt"), ("**/" * 30 + "**", "**")]
)
def test_repeated_stars_are_one(folder, repeated, once, monkeypatch):
    """Python's glob would take a time that grows exponentially."""
    monkeypatch.chdir(folder)
    assert expand_local(repeated) == expand_local(once) != []
