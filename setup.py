"""Builds csrc at install, with direct calls of the C++ compiler and nvcc. Where one is missing, the package works without its libraries.

There are three libraries. `_words` (preprocessing's word cache) and `_C` (the operators' schemas and CPU kernels) need a C++ compiler;
`_C_cuda` (CUDA kernels) needs a CUDA build of torch and nvcc. MEGATRON_PATCH_CUDA=0 omits `_C_cuda`; MEGATRON_PATCH_CUDA=1 requires it,
even with a CPU build of torch, for use on another machine. MEGATRON_PATCH_CUDA_ARCHS lists its GPU architectures. The operators use torch's
stable ABI. `torch.utils.cpp_extension` is not used, because it rejects CUDA sources with a CPU build of torch and guesses the toolkit.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_backend import OLDEST_TORCH, find_torch, is_too_old

# The libraries use only what torch 2.11 has, so that they load in it and in every later version.
TORCH_TARGET = "0x020b000000000000"


ARCHITECTURES = "80;90;100"
STABLE_ABI = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"


@dataclass(frozen=True)
class Library:
    """A shared library in the package's folder.

    Args:
        name: its name without .so.
        sources: files to compile, relative to this file's folder, as setuptools requires.
        headers: further files whose changes require a new build.
        otherwise: what a user should know where it is not built.
    """

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    otherwise: str = "The plain formulas are used instead: the same results, slower."


LIBRARIES = (
    Library("_words", ("csrc/cpu/word_cache.cpp",), (), "Without it, preprocessing yields the same tokens, slower for SentencePiece."),
    Library(
        "_C",
        ("csrc/schemas.cpp", "csrc/cpu/bindings.cpp", "csrc/cpu/patch_embedding.cpp", "csrc/cpu/multi_token_loss.cpp"),
        ("csrc/arguments.h", "csrc/cpu/patch_embedding.h", "csrc/cpu/multi_token_loss.h"),
    ),
    Library(
        "_C_cuda",
        ("csrc/cuda/bindings.cpp", "csrc/cuda/patch_embedding.cu", "csrc/cuda/multi_token_loss.cu"),
        ("csrc/arguments.h", "csrc/cuda/launch.h", "csrc/cuda/common.cuh", "csrc/cuda/running_softmax.cuh"),
    ),
)


class NotWanted(Exception):
    """The reason why a library is not wanted here, which needs no warning."""


class CannotBuild(Exception):
    """The reason why a library cannot be built here; the package works without it."""


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: $CXX (which can have several words, as `ccache g++`), g++, c++ or clang++."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        if shutil.which(words[0]) is None:
            raise CannotBuild(f"$CXX names {words[0]!r}, which is not on PATH")
        return words
    found = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise CannotBuild("no C++ compiler was found (g++, c++, clang++); install one, or set $CXX")
    return [found]


def torch_folder() -> Path:
    """Returns the folder where torch is installed, without importing it."""
    found = find_torch()
    if found is None:
        raise CannotBuild("torch is not installed; install it first, then install this package again")
    folder, version = found
    if is_too_old(version):
        raise CannotBuild(f"torch {version} is too old; install torch {'.'.join(map(str, OLDEST_TORCH))} or later")
    return folder


def torch_cuda() -> str | None:
    """Returns the CUDA version that torch was built with, or None."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def call(*command: str) -> str:
    """Runs a compiler and returns its output; its messages go to the build's log."""
    print(shlex.join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CannotBuild(f"the compiler failed ({shlex.join(command)}):\n{(result.stdout + result.stderr)[-4000:]}")
    sys.stderr.write(result.stderr)
    return result.stdout


def torch_headers() -> tuple[str, ...]:
    """Returns the options to find torch's headers, as system headers, so that they cause no warnings."""
    include = torch_folder() / "include"
    return ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"))


def torch_libraries() -> tuple[str, ...]:
    """Returns the options to link with torch."""
    return (f"-L{torch_folder() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")


def build_cpu(library: Library, output: Path, _: Path) -> None:
    """Builds `_C` with one call of the C++ compiler."""
    call(
        *compiler(),
        *("-shared", "-fPIC", "-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden"),
        "-ffp-contract=off",  # the same bits on every machine
        STABLE_ABI,
        *torch_headers(),
        *library.sources,
        *torch_libraries(),
        *("-o", str(output)),
    )


def build_words(library: Library, output: Path, _: Path) -> None:
    """Builds `_words` with one call of the C++ compiler, without torch."""
    call(
        *compiler(), "-shared", "-fPIC", "-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden", *library.sources, "-o", str(output)
    )


def check_cuda_wanted() -> None:
    """Checks that `_C_cuda` is to be built, and can be.

    Raises:
        NotWanted: MEGATRON_PATCH_CUDA=0, or a CPU build of torch.
        CannotBuild: there is no nvcc, or its CUDA version is not torch's.
    """
    wish = os.environ.get("MEGATRON_PATCH_CUDA")
    if wish not in (None, "", "0", "1"):
        raise CannotBuild(f"MEGATRON_PATCH_CUDA is {wish!r}; allowed: 0 and 1")
    if wish == "0":
        raise NotWanted("MEGATRON_PATCH_CUDA is 0")
    if wish != "1" and torch_cuda() is None:
        raise NotWanted("torch is a CPU build")
    if shutil.which("nvcc") is None:
        raise CannotBuild("nvcc was not found; install the CUDA toolkit, and add its bin folder to PATH")
    # Each major version has its own runtime library, and only that of torch's version is certain to exist when the library is loaded.
    found, theirs = re.search(r"release (\d+)", call("nvcc", "--version")), torch_cuda()
    if found and theirs and theirs.split(".")[0] != found[1]:
        raise CannotBuild(
            f"nvcc has CUDA {found[1]}, but torch was built with CUDA {theirs}; put an nvcc of torch's major version first on PATH"
        )


def architectures() -> list[str]:
    """Returns the GPU architectures to build for: the requested ones that this nvcc supports."""
    wanted = [name for name in re.split(r"[;,\s]+", os.environ.get("MEGATRON_PATCH_CUDA_ARCHS", ARCHITECTURES)) if name]
    known = re.findall(r"compute_(\d+\w?)", call("nvcc", "--list-gpu-arch"))
    found = [name for name in wanted if name in known]
    if not found:
        raise CannotBuild(f"nvcc supports none of the GPU architectures {' '.join(wanted)}; it supports {' '.join(known)}")
    return found


def build_cuda(library: Library, output: Path, work: Path) -> None:
    """Builds `_C_cuda`: compiles each source with nvcc, in parallel, then links them. Only the bindings include torch's headers."""
    check_cuda_wanted()
    names = architectures()
    # Machine code for each architecture, and PTX, which newer GPUs compile when the library is loaded.
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    targets.append(f"-gencode=arch=compute_{names[0]},code=compute_{names[0]}")
    common = ("nvcc", "-c", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden")
    strict = ("-Werror", "all-warnings", "-Xcompiler", "-Werror") if os.environ.get("MEGATRON_PATCH_STRICT") == "1" else ()
    objects, commands = [], []
    for source in library.sources:
        objects.append(str(work / (Path(source).stem + Path(source).suffix + ".o")))
        if source.endswith(".cu"):
            own = ("-std=c++17", *targets)
        else:
            own = ("-std=c++20", STABLE_ABI, f'-DMEGATRON_PATCH_ARCHITECTURES="{" ".join(names)}"', *torch_headers())
        commands.append((*common, *strict, *own, source, "-o", objects[-1]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: call(*command), commands))
    # Some of torch's libraries provide no symbol that the linker sees, but the library does not load without them.
    call(
        *("nvcc", "-shared", "-cudart", "shared", "-Xlinker", "--no-as-needed"),
        *objects,
        *torch_libraries(),
        *("-o", str(output)),
    )


BUILDERS = {"_words": build_words, "_C": build_cpu, "_C_cuda": build_cuda}


def build(library: Library, output: Path) -> None:
    """Builds a library under a temporary name, and renames it when it is complete."""
    unfinished = output.with_suffix(".tmp")
    try:
        with tempfile.TemporaryDirectory() as work:
            BUILDERS[library.name](library, unfinished, Path(work))
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


class BuildLibraries(build_ext):
    """Builds each library where setuptools expects it; a failure is a warning, not an error."""

    in_package = False

    def run(self) -> None:
        self.in_package = bool(self.inplace or self.editable_mode)  # setuptools resets this while it builds
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Returns a file name without a Python version, because the libraries do not use Python's ABI."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = next(library for library in LIBRARIES if extension.name == f"megatron_patch.{library.name}")
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(library, output)
        except (CannotBuild, NotWanted) as reason:
            # The library of an earlier build must not be mistaken for a new one.
            output.unlink(missing_ok=True)
            if self.in_package:
                Path("megatron_patch", output.name).unlink(missing_ok=True)
            if isinstance(reason, NotWanted):
                print(f"{library.name} is not built: {reason}")
                return
            if library.name == "_C_cuda" and os.environ.get("MEGATRON_PATCH_CUDA") == "1":
                raise
            # pip shows the warnings of a build, but hides what it prints.
            warnings.warn(f"megatron_patch: {library.name} is not built: {reason}\n{library.otherwise}", stacklevel=1)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class BuildPackage(build_py):
    """Puts example configurations, templates for Slurm and constraints.txt into the package's folder `share` of a wheel."""

    def _get_data_files(self) -> list[tuple[str, str, str, list[str]]]:
        found: list[tuple[str, str, str, list[str]]] = super()._get_data_files()
        if not self.editable_mode:
            root = Path(__file__).resolve().parent
            for name in runpy.run_path(str(root / "megatron_patch" / "programs.py"))["shipped_files"](root):
                folder = str(Path(name).parent)
                found.append(("megatron_patch", folder, str(Path(self.build_lib, "megatron_patch", "share", folder)), [Path(name).name]))
        return found


setup(
    ext_modules=[
        Extension(f"megatron_patch.{library.name}", list(library.sources), depends=list(library.headers), optional=True)
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPackage},
)
