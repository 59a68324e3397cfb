"""Builds csrc at install: the C++ compiler is called directly on torch's stable ABI, and without one the package works without csrc.

`torch.utils.cpp_extension` is not used: it wants a CUDA toolkit that fits torch even where none is needed. Nothing is ever compiled while
the program runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Only what torch 2.11 had is used, so that the library loads in that and every later version.
TORCH_TARGET = "0x020b000000000000"
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Library:
    """A shared library beside the package's modules, and what it is made of (paths from here, as setuptools wants them)."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...]


LIBRARIES = (
    Library(
        "_C",
        ("csrc/schemas.cpp", "csrc/cpu/bindings.cpp", "csrc/cpu/patch_embedding.cpp", "csrc/cpu/multi_token_loss.cpp"),
        ("csrc/arguments.h", "csrc/cpu/patch_embedding.h", "csrc/cpu/multi_token_loss.h"),
    ),
)


class CannotBuild(Exception):
    """Why a library is not built here; the package works without."""


def compiler() -> list[str]:
    """The C++ compiler: $CXX (which may hold several words, as `ccache g++`), g++, c++ or clang++."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        if shutil.which(words[0]) is None:
            raise CannotBuild(f"$CXX names {words[0]!r}, which is not found")
        return words
    found = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise CannotBuild("there is no C++ compiler (g++, c++, clang++); install one, or name it in $CXX")
    return [found]


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise CannotBuild("torch is not installed where this is built; install it first, then use pip's --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"torch {version} is too old; torch {'.'.join(map(str, OLDEST_TORCH))} and later can be built against")
    return Path(found.origin).parent


def build(library: Library, output: Path) -> None:
    """Makes a library by one call of the compiler, under a temporary name until it is whole."""
    torch = torch_folder()
    unfinished = output.with_suffix(".tmp")
    command = [
        *compiler(),
        *("-shared", "-fPIC", "-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden"),
        "-ffp-contract=off",  # the same bits on every machine
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        *("-isystem", str(torch / "include"), "-isystem", str(torch / "include/torch/csrc/api/include")),
        *("-I", "csrc"),
        *library.sources,
        *(f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        *("-o", str(unfinished)),
    ]
    print(shlex.join(command))
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CannotBuild(f"the compiler failed ({shlex.join(command)}):\n{result.stderr[-4000:]}")
        sys.stderr.write(result.stderr)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


class BuildLibraries(build_ext):
    """Builds each library where setuptools wants it; a failure is told, not raised."""

    beside_modules = False

    def run(self) -> None:
        self.beside_modules = bool(self.inplace or self.editable_mode)  # setuptools forgets this while it builds
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the libraries do not use Python's ABI."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = next(library for library in LIBRARIES if extension.name == f"megatron_patch.{library.name}")
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(library, output)
        except CannotBuild as reason:
            # What an earlier build left must not pass for this one's.
            output.unlink(missing_ok=True)
            if self.beside_modules:
                Path("megatron_patch", output.name).unlink(missing_ok=True)
            # pip shows a build's warnings, and hides what it prints.
            warnings.warn(
                f"megatron_patch: {library.name} is not built: {reason}\nThe plain formulas serve: the same results, slower.", stacklevel=1
            )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[
        Extension(f"megatron_patch.{library.name}", list(library.sources), depends=list(library.headers), optional=True)
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildLibraries},
)
