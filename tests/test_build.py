"""Installation: the libraries are built where possible, with a clear note where not; the right files; consistent pins."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import build_backend
import megatron_patch
from megatron_patch.programs import shipped_files

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="there is no C++ compiler to build with"
)
DOCKERFILES = ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda")
NOTE = "The plain formulas are used instead"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copies the files that a build reads, without the results of earlier builds."""
    copy_checkout(tmp_path)
    return tmp_path


def copy_checkout(folder: Path) -> None:
    """Copies the files that a build reads into an existing folder."""
    names = ("setup.py", "build_backend.py", "MANIFEST.in", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "csrc", "examples")
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copytree(ROOT / "megatron_patch", folder / "megatron_patch", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "CXX" and not name.startswith("MEGATRON_PATCH_")}
    variables = {**kept, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=True)


def build_in_place(folder: Path, **environment: str) -> str:
    return python(folder, "setup.py", "build_ext", "--inplace", **environment).stderr


def hook(folder: Path, name: str, **environment: str) -> Path:
    """Calls the build backend as pip does, and returns the file it made."""
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
    assert "_C is not built" in note and "'no-such-compiler', which is not on PATH" in note and NOTE in note
    assert not list(checkout.rglob("*.so"))


def test_without_any_compiler_on_the_path_it_says_what_to_install(checkout, tmp_path_factory):
    note = build_in_place(checkout, PATH=str(tmp_path_factory.mktemp("empty")))
    assert "no C++ compiler was found" in note and "$CXX" in note and NOTE in note


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
    assert "torch 2.9.1 is too old; install torch 2.11 or later" in note and NOTE in note


def cuda_torch(folder: Path, cuda: str | None = None) -> str:
    """Makes a folder in which a build finds a torch built with CUDA, by default nvcc's version: this torch under another name."""
    if cuda is None:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else "release 13.0"
        cuda = re.search(r"release ([\d.]+)", said)[1]
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\ncuda: str | None = '{cuda}'\n")
    for name in ("include", "lib"):
        (folder / "torch" / name).symlink_to(Path(torch.__file__).parent / name)
    (folder / "torch-2.11.0.dist-info").mkdir()
    (folder / "torch-2.11.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    return str(folder)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_the_cuda_library_compiles_without_a_warning_for_each_architecture(checkout, tmp_path_factory):
    """With a CUDA build of torch it is built silently; with a CPU build it is built on request, and does not load."""
    note = build_in_place(checkout, MEGATRON_PATCH_STRICT="1", PYTHONPATH=cuda_torch(tmp_path_factory.mktemp("cuda")))
    assert (checkout / "megatron_patch" / "_C_cuda.so").is_file(), note
    out = python(checkout, "-m", "megatron_patch.ops", PYTHONPATH=str(checkout)).stdout
    assert "compiled for CUDA (sm_80 sm_90 sm_100)" in out
    if torch.version.cuda is None:
        assert "none: this build of torch has no CUDA; the plain formulas are used" in out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_architectures_are_chosen_and_unknown_ones_named(checkout):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_in_place(checkout, MEGATRON_PATCH_CUDA="1", MEGATRON_PATCH_CUDA_ARCHS="12;13")
    assert "nvcc supports none of the GPU architectures 12 13; it supports" in failure.value.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_beside_a_cpu_build_of_torch_no_cuda_library_is_built_and_nothing_is_warned(checkout):
    (checkout / "megatron_patch" / "_C_cuda.so").write_bytes(b"from an earlier build")
    done = python(checkout, "setup.py", "build_ext", "--inplace", CXX="no-such-compiler")
    assert "_C_cuda is not built: torch is a CPU build" in done.stdout and "_C_cuda" not in done.stderr
    assert not list(checkout.rglob("*.so"))


def test_a_cuda_torch_without_nvcc_is_told_what_to_install(checkout, tmp_path_factory):
    folder = cuda_torch(tmp_path_factory.mktemp("cuda"))
    empty = str(tmp_path_factory.mktemp("empty"))
    note = build_in_place(checkout, PYTHONPATH=folder, PATH=empty)
    assert "_C_cuda is not built: nvcc was not found; install the CUDA toolkit" in note and NOTE in note
    silent = build_in_place(checkout, PYTHONPATH=folder, PATH=empty, MEGATRON_PATCH_CUDA="0")
    assert "_C_cuda" not in silent
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_in_place(checkout, PYTHONPATH=folder, PATH=empty, MEGATRON_PATCH_CUDA="1")
    assert "nvcc was not found" in failure.value.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_an_nvcc_of_another_cuda_than_torch_s_is_told_apart(checkout, tmp_path_factory):
    """The library would need a CUDA runtime that torch does not install."""
    note = build_in_place(checkout, CXX="no-such-compiler", PYTHONPATH=cuda_torch(tmp_path_factory.mktemp("old"), cuda="9.2"))
    assert re.search(
        r"_C_cuda is not built: nvcc has CUDA \d+, but torch was built with CUDA 9.2; put an nvcc of torch's major version", note
    )
    assert not list(checkout.rglob("_C_cuda*"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build with")
def test_a_warning_in_a_kernel_fails_the_strict_build(checkout, tmp_path_factory):
    kernel = checkout / "csrc" / "cuda" / "patch_embedding.cu"
    kernel.write_text(kernel.read_text() + "\n__global__ void careless() { int never_used; }\n")
    build = {"CXX": "no-such-compiler", "MEGATRON_PATCH_CUDA_ARCHS": "80", "PYTHONPATH": cuda_torch(tmp_path_factory.mktemp("cuda"))}
    note = build_in_place(checkout, MEGATRON_PATCH_STRICT="1", **build)
    assert "_C_cuda is not built" in note and "never_used" in note
    assert not list(checkout.rglob("_C_cuda*"))


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
    others = {"py.typed", "reporting/report.html", "reporting/report.css", "reporting/report.js"}
    others |= {f"share/{name}" for name in shipped_files(ROOT)}
    assert {"share/constraints.txt", "share/examples/configs/llama_70b.yaml", "share/examples/slurm/one_node.sbatch"} <= others
    assert modules | {f"megatron_patch/{name}" for name in others} <= names
    assert any(name.endswith("/entry_points.txt") for name in names)
    assert {name.split("/")[0] for name in names} == {"megatron_patch", f"megatron_patch-{megatron_patch.__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_a_source_distribution_holds_all_that_a_build_reads(checkout):
    with tarfile.open(hook(checkout, "build_sdist")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    files = {"setup.py", "build_backend.py", "pyproject.toml", "LICENSE", "README.md", "megatron_patch/py.typed"}
    assert sources | files | set(shipped_files(ROOT)) <= names


def test_torch_is_a_build_requirement_only_where_the_environment_has_none(monkeypatch):
    assert build_backend._torch() == []
    monkeypatch.setattr(build_backend, "find_torch", lambda: (Path("torch"), "2.9.1"))
    assert build_backend._torch() == ["torch>=2.11"]
    monkeypatch.undo()
    monkeypatch.setattr(build_backend.importlib.machinery.PathFinder, "find_spec", lambda name, folders=None: None)
    assert build_backend.find_torch() is None and build_backend._torch() == ["torch>=2.11"]


def test_an_isolated_build_finds_the_torch_of_the_environment(monkeypatch):
    """pip's environment for builds leaves the environment's folder out of `sys.path`."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.endswith("-packages")])
    assert importlib.machinery.PathFinder.find_spec("torch") is None
    assert build_backend.find_torch() == (Path(torch.__file__).parent, str(torch.__version__))


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
    """Returns every dependency of the package and of its extras, as the installation recorded them, without the package itself."""
    from importlib.metadata import requires

    return [Requirement(line) for line in requires("megatron_patch") or [] if Requirement(line).name != "megatron_patch"]


def applies(requirement: Requirement, python_version: str) -> bool:
    """Returns whether a dependency is one of this Python's, with all extras."""
    environments = [
        {"python_version": python_version, "extra": extra} for extra in ("", *(metadata("megatron_patch").get_all("Provides-Extra") or []))
    ]
    return requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in environments)


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_range(python_version):
    pinned = pins(python_version)
    for requirement in (requirement for requirement in requirements() if applies(requirement, python_version)):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"{requirement} on Python {python_version}"


def test_the_installed_torch_is_one_that_the_package_allows():
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert torch.specifier.contains(version("torch").partition("+")[0])
    assert SpecifierSet(">=2.11") == torch.specifier


def test_make_says_what_it_can_do():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert listed == ["help", "venv", "nvme", "lint", "test", "slow", "docs", "quickstart", "compare", "bench", "clean", "distclean"]


@pytest.mark.parametrize("name", ["Makefile", "setup.py", "build_backend.py", "pyproject.toml", "constraints.txt", ".ci/run", *DOCKERFILES])
def test_packages_come_from_wherever_pip_looks(name):
    assert not re.search(r"://|--extra-index-url|\.(?:org|com)\b", (ROOT / name).read_text())


def test_ci_runs_the_test_suite_from_any_folder():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text and text.splitlines()[-1] == "make test"


def run_ci(folder: Path, missing: str = "", **settings: str) -> tuple[int, str]:
    """Runs `.ci/run` where its commands only print their names, and returns (exit code, output); a missing command is not found."""
    (folder / "bin").mkdir(parents=True)
    for name in ("bash", "dirname", "sed", "tail", "python3", "g++", "nvcc", "make", "apt-get"):
        program = folder / "bin" / name
        if name == missing:
            continue
        if name in ("bash", "dirname", "sed", "tail"):
            program.symlink_to(shutil.which(name) or "/bin/true")
        else:
            program.write_text(f'#!/bin/sh\necho "{name} $*"\n')
            program.chmod(0o755)
    command = [ROOT / ".ci" / "run"]
    environment = {"PATH": str(folder / "bin"), **settings}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("missing", ["g++", "nvcc"])
def test_ci_fails_where_the_kernels_could_not_be_compiled(tmp_path, missing):
    code, text = run_ci(tmp_path, missing)
    assert code == 127 and missing in text


def test_ci_installs_what_tests_need_and_fails_where_it_cannot(tmp_path):
    code, text = run_ci(tmp_path / "all")
    assert code == 0 and text.splitlines()[-3:] == ["make venv", "make -j2 nvme lint", "make test"]
    code, text = run_ci(tmp_path / "ci", "apt-get")
    assert code == 1 and "make test" not in text and "their tests would be skipped" in text
    code, text = run_ci(tmp_path / "person", "apt-get", MEGATRON_PATCH_CI="")
    assert code == 0 and text.splitlines()[-1] == "make test" and "nvme" not in text
