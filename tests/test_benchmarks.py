"""Every benchmark's command that is written down somewhere is one that its program takes: those for a GPU run where nobody watches."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "benchmarks").glob("*.*")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
PROGRAMS = "kernels|layouts|training"
"""Those with flags."""


def commands() -> list[str]:
    """What follows "python" in a shell script, on a line of its own in a docstring, or between backticks in a document."""
    found = set()
    for path in SOURCES:
        if path.suffix in (".py", ".sh", ".md"):
            pattern = rf"(?:\$python|^ +python|`python) (benchmarks/(?:{PROGRAMS})\.py[^`\n]*)"
            text = path.read_text()
            loops = {f"${name}": words.split() for name, words in re.findall(r"^for (\w+) in ([^;]+); do", text, re.MULTILINE)}
            for line in re.findall(pattern, text, re.MULTILINE):
                line = re.split(r"\s{2,}|;", line)[0].strip()
                found |= {line.replace(name, word) for name, words in loops.items() if name in line for word in words} or {line}
    return sorted(found)


def test_commands_are_found():
    assert len(commands()) > 5 and any("--flags=--compile" in line for line in commands())


@pytest.mark.parametrize("line", commands())
def test_a_written_command_is_taken(line, monkeypatch, capsys):
    script, *words = shlex.split(line)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(Path(script).stem)
    # Help comes when all words before it have been understood.
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0, capsys.readouterr().err
