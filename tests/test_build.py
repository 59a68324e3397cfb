"""What an installation makes: the library where it can be compiled, a clear note where it cannot, the right files, pins that fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megatron_patch

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="there is no C++ compiler to build with"
)
NOTE = "The plain formulas serve"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, without what earlier builds left."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    shutil.copytree(ROOT / "megatron_patch", tmp_path / "megatron_patch", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "CXX" and not name.startswith("MEGATRON_PATCH_")}
    variables = {**kept, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=True)


def build_in_place(folder: Path, **environment: str) -> str:
    return python(folder, "setup.py", "build_ext", "--inplace", **environment).stderr


def hook(folder: Path, name: str, **environment: str) -> Path:
    """Calls the build backend as pip does; the file it made."""
    call = f"from setuptools import build_meta; print(build_meta.{name}('made'))"
    return folder / "made" / python(folder, "-c", call, **environment).stdout.split()[-1]


@needs_compiler
def test_the_library_compiles_without_a_warning_and_works_where_it_lies(checkout):
    compiler = next(name for name in ("g++", "c++", "clang++") if shutil.which(name))
    assert NOTE not in build_in_place(checkout, CXX=f"{compiler} -Werror")
    script = (
        "import torch; from megatron_patch.ops import fused_embedding, native; assert native.available();"
        "print(native.LIBRARY, fused_embedding.patch_embedding(torch.eye(3), torch.tensor([[0, 2]])).tolist())"
    )
    # Isolated from where this package is installed: the copy must be what is loaded.
    out = python(checkout, "-c", f"import sys; sys.path.insert(0, {str(checkout)!r}); {script}").stdout
    assert out.strip() == f"{checkout / 'megatron_patch' / '_C.so'} [[0.5, 0.0, 0.5]]"


def test_without_a_compiler_the_note_says_so_and_nothing_stale_is_left(checkout):
    library = checkout / "megatron_patch" / "_C.so"
    library.write_bytes(b"from an earlier build")
    note = build_in_place(checkout, CXX="no-such-compiler")
    assert "_C is not built" in note and "'no-such-compiler', which is not found" in note and NOTE in note
    assert not list(checkout.rglob("*.so"))


def test_without_any_compiler_on_the_path_it_says_what_to_install(checkout, tmp_path_factory):
    note = build_in_place(checkout, PATH=str(tmp_path_factory.mktemp("empty")))
    assert "there is no C++ compiler" in note and "$CXX" in note and NOTE in note


@needs_compiler
def test_a_failed_compilation_shows_what_the_compiler_said(checkout):
    source = checkout / "csrc" / "cpu" / "bindings.cpp"
    source.write_text(source.read_text() + "\nthis is not C++;\n")
    note = build_in_place(checkout)
    assert "the compiler failed" in note and "bindings.cpp" in note and "error" in note and NOTE in note
    assert not list(checkout.rglob("_C*.so")) and not list(checkout.rglob("*.tmp"))


def test_a_torch_that_is_too_old_is_named(checkout, tmp_path_factory):
    old = tmp_path_factory.mktemp("old")
    (old / "torch").mkdir()
    (old / "torch" / "__init__.py").write_text("")
    (old / "torch-2.9.1.dist-info").mkdir()
    (old / "torch-2.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    note = build_in_place(checkout, PYTHONPATH=str(old))
    assert "torch 2.9.1 is too old; torch 2.11 and later" in note and NOTE in note


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_the_cuda_library_compiles_without_a_warning_for_each_architecture(checkout):
    """Asked for, as a build machine may have no CUDA torch; it then lies there, and does not load."""
    build_in_place(checkout, MEGATRON_PATCH_CUDA="1", MEGATRON_PATCH_STRICT="1")
    assert (checkout / "megatron_patch" / "_C_cuda.so").is_file()
    out = python(checkout, "-m", "megatron_patch.ops", PYTHONPATH=str(checkout)).stdout
    assert "compiled for CUDA (sm_80 sm_90 sm_100)" in out
    if torch.version.cuda is None:
        assert "none: this torch is a build without CUDA; the plain formulas serve" in out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_architectures_are_chosen_and_unknown_ones_named(checkout):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_in_place(checkout, MEGATRON_PATCH_CUDA="1", MEGATRON_PATCH_CUDA_ARCHS="12;13")
    assert "knows none of the GPU architectures 12 13; it knows" in failure.value.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_beside_a_cpu_build_of_torch_no_cuda_library_is_built_and_nothing_is_warned(checkout):
    (checkout / "megatron_patch" / "_C_cuda.so").write_bytes(b"from an earlier build")
    done = python(checkout, "setup.py", "build_ext", "--inplace", CXX="no-such-compiler")
    assert "_C_cuda is not built: torch is a CPU build" in done.stdout and "_C_cuda" not in done.stderr
    assert not list(checkout.rglob("*.so"))


def test_a_cuda_torch_without_nvcc_is_told_what_to_install(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    (folder / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ndebug = False\ncuda: str | None = '13.0'\n")
    (folder / "torch-2.11.0.dist-info").mkdir()
    (folder / "torch-2.11.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    empty = str(tmp_path_factory.mktemp("empty"))
    note = build_in_place(checkout, PYTHONPATH=str(folder), PATH=empty)
    assert "_C_cuda is not built: there is no nvcc; install the CUDA toolkit" in note and NOTE in note
    silent = build_in_place(checkout, PYTHONPATH=str(folder), PATH=empty, MEGATRON_PATCH_CUDA="0")
    assert "_C_cuda" not in silent
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_in_place(checkout, PYTHONPATH=str(folder), PATH=empty, MEGATRON_PATCH_CUDA="1")
    assert "there is no nvcc" in failure.value.stderr


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_a_wheel_holds_the_package_its_licence_and_what_could_be_built(checkout, compiled):
    (checkout / "tests").mkdir()
    (checkout / "tests" / "__init__.py").write_text("")
    wheel = hook(checkout, "build_wheel", **({} if compiled else {"CXX": "no-such-compiler"}))
    assert wheel.name.startswith(f"megatron_patch-{megatron_patch.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert ("megatron_patch/_C.so" in names) == compiled
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_patch").rglob("*.py")}
    assert modules | {"megatron_patch/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"megatron_patch", f"megatron_patch-{megatron_patch.__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_a_source_distribution_holds_all_that_a_build_reads(checkout):
    with tarfile.open(hook(checkout, "build_sdist")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "megatron_patch/py.typed"} <= names


def pins(python_version: str) -> dict[str, str]:
    """Package -> pinned version, for a version of Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
                (pin,) = requirement.specifier
                name = canonicalize_name(requirement.name)
                assert pin.operator == "==" and name not in found, line
                found[name] = pin.version
    return found


def requirements() -> list[Requirement]:
    """Every dependency of the package and of its extras, out of what the installation recorded, but for the package itself."""
    from importlib.metadata import requires

    return [Requirement(line) for line in requires("megatron_patch") or [] if Requirement(line).name != "megatron_patch"]


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_range(python_version):
    pinned = pins(python_version)
    for requirement in requirements():
        if "wandb" in str(requirement.marker):
            continue  # an account elsewhere is needed to try it
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"{requirement} on Python {python_version}"


def test_the_installed_torch_is_one_that_the_package_allows():
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert torch.specifier.contains(version("torch").partition("+")[0])
    assert SpecifierSet(">=2.11") == torch.specifier


def test_make_says_what_it_can_do():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert listed == ["help", "venv", "lint", "test", "slow", "quickstart", "compare", "bench", "clean", "distclean"]


@pytest.mark.parametrize("name", ["Makefile", "setup.py", "pyproject.toml", "constraints.txt", ".ci/run"])
def test_packages_come_from_wherever_pip_looks(name):
    assert not re.search(r"://|--extra-index-url|\.(?:org|com)\b", (ROOT / name).read_text())


def test_ci_runs_the_test_suite_from_any_folder():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text and text.splitlines()[-1] == "make test"
