"""Programs that find another project's package of the same name, or a Python without the requirements."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.package_check import REQUIREMENTS, missing_requirements

ROOT = Path(__file__).parent.parent
PROGRAMS = [*sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.name != "package_check.py")]


@pytest.fixture
def foreign(tmp_path):
    """A package of this name that must not even be imported."""
    package = tmp_path / "megatron_patch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('foreign code ran')\n")
    (package / "arguments.py").write_text("")
    return tmp_path


def run(foreign, *words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(foreign), str(ROOT)])}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_tool_checks_before_it_imports():
    for name in PROGRAMS:
        lines = (ROOT / "tools" / name).read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        ours = [index for index, module in enumerate(imports) if module.startswith("megatron_patch")]
        assert imports.index("package_check") < min(ours), name


def test_a_foreign_package_is_refused_in_three_parts(foreign):
    result = run(foreign, "tools/plot.py", "--help")
    assert result.returncode == 2 and "foreign code ran" not in result.stderr
    what, allowed, do = result.stderr.strip().splitlines()
    assert str(foreign / "megatron_patch") in what and str(ROOT / "megatron_patch") in allowed and "pip install -e" in do


def test_the_program_refuses_it_too_where_it_comes_first(foreign):
    first = f"import runpy, sys; sys.path.insert(0, {str(foreign)!r}); runpy.run_path('pretrain_gpt_patch.py', run_name='__main__')"
    result = run(foreign, "-c", first)
    assert result.returncode == 2 and "is another project's" in result.stderr
    # Started as a script the program's own folder comes first.
    assert run(foreign, "pretrain_gpt_patch.py", "--help").returncode == 0


def test_a_missing_package_says_how_to_install_it():
    check = "import importlib.util, runpy; runpy.run_path('tools/package_check.py')"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "is not installed" in result.stderr and "pip install -e" in result.stderr


def test_a_python_without_the_requirements_gets_one_sentence():
    """`-S` leaves out site-packages, as a Python outside of the virtual environment does."""
    command = [sys.executable, "-S", "pretrain_gpt_patch.py", "--help"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert sys.executable in result.stderr and "tyro" in result.stderr and "source .venv/bin/activate" in result.stderr


def test_the_sentence_names_what_is_missing_and_what_to_run(tmp_path):
    assert missing_requirements(tmp_path) is None
    said = missing_requirements(tmp_path, ("sys", "no_such_module"))
    assert "(no_such_module)" in said and "run `make venv`, then `source" in said
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert "run `source .venv/bin/activate`" in missing_requirements(tmp_path, ("no_such_module",))


def test_the_modules_are_those_of_the_packages_that_the_project_requires():
    listed = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0]
    packages = re.findall(r'^  "([\w-]+)', listed, re.MULTILINE)
    providers = importlib.metadata.packages_distributions()
    assert {name.lower() for module in REQUIREMENTS for name in providers[module]} >= {name.lower() for name in packages}
    assert len(REQUIREMENTS) == len(packages)
