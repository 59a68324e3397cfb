"""Programs that find another project's package of the same name, or a Python without the requirements."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch import programs, requirements
from megatron_patch.errors import ConfigError

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
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 3
    assert sys.executable in result.stderr and "tyro" in result.stderr and "source .venv/bin/activate" in result.stderr


def test_the_error_names_what_is_missing_and_what_to_run(tmp_path, monkeypatch):
    assert requirements.check_required() is None
    for name in ("pretrain_gpt_patch.py", "tools/package_check.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for module in (programs, requirements):
        monkeypatch.setattr(module, "HOME", tmp_path)
    monkeypatch.setitem(requirements.REQUIRED, "no_such_module", "no-such-package")
    said = requirements.check_required(("sys", "no_such_module"))
    assert said.what.endswith("lacks 1 required package: no-such-package")
    assert said.do == f"in {tmp_path}, run `make venv`, then `source .venv/bin/activate`; without make: pip install -e '.[train]'"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert requirements.check_required(("no_such_module",)).do == f"in {tmp_path}, run `source .venv/bin/activate`"
    (tmp_path / "pretrain_gpt_patch.py").unlink()
    assert requirements.check_required(("no_such_module",)).do == f"run {sys.executable} -m pip install megatron_patch"


def test_a_missing_optional_package_is_an_error_in_three_parts(monkeypatch):
    monkeypatch.setattr(requirements, "is_missing", lambda module: module in ("deepspeed", "torch"))
    constraints = f"-c {ROOT / 'constraints.txt'}"
    with pytest.raises(ConfigError) as error:
        requirements.require("deepspeed", "training")
    assert str(error.value).splitlines() == [
        "training needs DeepSpeed, which is not installed",
        "  Allowed: an installation with the extra [train]",
        f"  What to do: install torch first; then run pip install {constraints} 'megatron_patch[train]'",
    ]
    with pytest.raises(ConfigError, match="this command needs DeepSpeed"), requirements.explained_imports():
        raise ModuleNotFoundError("No module named 'deepspeed.ops'", name="deepspeed.ops")
    with pytest.raises(ConfigError, match="lacks 1 required package: torch"), requirements.explained_imports():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    # A package that is there but lacks a module of its own is another problem, which keeps its traceback.
    with pytest.raises(ModuleNotFoundError), requirements.explained_imports():
        raise ModuleNotFoundError("No module named 'rich.x'", name="rich.x")
    requirements.require("rich", "this")


def test_the_modules_are_those_of_the_packages_that_the_project_names():
    """`requirements` is the one list of the programs; here it is held to pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^  "([\w-]+)', project.split("\ndependencies = [")[1].split("\n]")[0], re.MULTILINE)
    assert {name.lower() for name in packages} == set(requirements.REQUIRED.values())
    providers = importlib.metadata.packages_distributions()
    for module, package in requirements.REQUIRED.items():
        assert package in {name.lower() for name in providers[module]}
    extras = dict(
        re.findall(r"^(\w+) = \[(.*?)\]", project.split("[project.optional-dependencies]\n")[1].split("\ndocs =")[0], re.MULTILINE)
    )
    for module, extra in requirements.EXTRAS.items():
        listed = {name.lower().replace("-", "_") for name in re.findall(r'"([\w-]+)', extras[extra])}
        assert listed & {name.lower().replace("-", "_") for name in providers[module]}, module
    assert set(extras) == set(requirements.EXTRAS.values())
    everything = re.search(r'"megatron_patch\[(.*?)\]"', project).group(1).split(",")
    assert set(everything) == {*extras, "docs"}
