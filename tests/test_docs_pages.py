"""Holds the pages for contributors to the code: files, functions and rooms that they name exist; every page is in the site's navigation."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_floors import FLOORS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_patch"
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()
OTHER_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", ".github/pull_request_template.md")]
TOP = ("pretrain_gpt_patch.py", "csrc/", "docs/", "tests/", "tools/", "examples/", "benchmarks/")
"""What is named from the repository's root; all else is a path inside of the package."""


def steps() -> list[str]:
    """The numbered steps of the walk-throughs and the rows of "Where to change what", each as one line."""
    items = re.findall(r"^\d+\. (.*(?:\n {2,}.*)*)", ARCHITECTURE, re.MULTILINE)
    table = ARCHITECTURE.partition("## Where to change what")[2].partition("\n## ")[0]
    items += re.findall(r"^\| (.*) \|$", table, re.MULTILINE)[2:]
    return [re.sub(r"\s+", " ", item) for item in items]


def files_in(text: str) -> list[Path]:
    """The files and folders that backticked words of a text name."""
    words = [word for word in re.findall(r"`([\w./-]+)`", text) if re.search(r"\.(py|cpp|md)$|^csrc/", word)]
    return [(ROOT if word.startswith(TOP) else PACKAGE) / word for word in words]


def names_in(text: str) -> list[str]:
    """The functions, methods and classes that backticked words of a text name: `name()`, `Class.method()`, `Class`."""
    return [call or name for call, name in re.findall(r"`(?:([\w.]+)\(\)|([A-Z][a-z]\w+))`", text)]


def defined(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, their methods as `Class.method`, and names that it assigns."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_there_are_four_walk_throughs():
    assert len(re.findall(r"^## An? ", ARCHITECTURE, re.MULTILINE)) == 4 and len(steps()) > 40


@pytest.mark.parametrize("step", steps(), ids=lambda step: re.sub(r"\W+", "-", step)[:40])
def test_each_step_names_files_and_functions_that_exist(step):
    files = files_in(step)
    assert files, "a step names the file that it happens in"
    for path in files:
        assert path.exists(), path
    known = set().union(*(defined(path) for path in files if path.suffix == ".py"))
    missing = [name for name in names_in(step) if name not in known]
    assert not missing, f"{missing} are not defined in {[path.name for path in files]}"


def test_the_picture_shows_the_floors():
    rows = [re.findall(r"\w+", row) for row in re.findall(r"^│ (\w[\w· ]*?) +│$", ARCHITECTURE, re.MULTILINE)]
    assert [set(row) for row in rows] == FLOORS[::-1]


def test_the_table_has_every_room_from_the_ground_up():
    rooms = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", ARCHITECTURE, re.MULTILINE)
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    assert sorted(rooms) == sorted(level)
    assert [level[room] for room in rooms] == sorted(level[room] for room in rooms)


def test_the_picture_fits_100_columns():
    (picture,) = re.findall(r"^```text\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert max(map(len, picture.splitlines())) <= 100


@pytest.mark.parametrize("path", OTHER_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_files_and_targets_of_other_pages_exist(path):
    text, targets = path.read_text(), set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for link in re.findall(r"\]\(([^)#:]+)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:docs|tests|megatron_patch|benchmarks|tools|\.ci)/[\w./-]+\w)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\bmake ([a-z]+)", "".join(re.findall(r"`make [^`]*`|^make .*$", text, re.MULTILINE))):
        assert target in targets, target


def in_navigation(entries) -> list[str]:
    """The pages of a navigation, nested as mkdocs has it."""
    pages: list[str] = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += [value] if isinstance(value, str) else in_navigation(value)
    return pages


def test_every_page_is_in_the_navigation():
    pages = in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_reference_names_modules_that_exist():
    modules = re.findall(r"^::: (\S+)$", "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md")), re.MULTILINE)
    paths = [ROOT / name.replace(".", "/") for name in modules]
    assert len(modules) > 40 and len(set(modules)) == len(modules)
    assert [path.name for path in paths if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install -e '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    """Also finds documented arguments that a signature lacks."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line)
    page = (tmp_path / "site" / "reference" / "stages.html").read_text()
    assert "megatron_patch.stages.StagePlan" in page and "global_batch_size" in page
