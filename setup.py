"""Builds csrc at install: the C++ compiler is called directly on torch's stable ABI, and without one the package works without csrc.

`torch.utils.cpp_extension` is not used: it wants a CUDA toolkit that fits torch even where none is needed. Nothing is ever compiled while
the program runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Symbols of torch 2.11 alone, so that the library loads in that and every later version.
TARGET_VERSION = "0x020b000000000000"


@dataclass(frozen=True)
class Library:
    """A shared library beside the package's modules."""

    name: str
    sources: tuple[str, ...]


LIBRARIES = (Library("_C", ("csrc/bindings.cpp", "csrc/cpu/patch_embedding.cpp")),)


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or c++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def command(cxx: str, library: Library, output: Path) -> list[str]:
    """The one compiler call that makes a library."""
    import torch
    from torch.utils.cpp_extension import include_paths

    lib = Path(torch.__file__).parent / "lib"
    return [
        cxx,
        "-shared",
        "-fPIC",
        "-O3",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        *(f"-isystem{path}" for path in include_paths()),
        f"-I{ROOT / 'csrc'}",
        *(str(ROOT / source) for source in library.sources),
        f"-L{lib}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(output),
    ]


class BuildLibraries(build_ext):
    """Builds each library where setuptools wants it; a failure is told, not raised."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the libraries do not use Python's ABI."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = next(library for library in LIBRARIES if extension.name.endswith(library.name))
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        if cxx is None:
            return self._without(library, "no C++ compiler was found (set CXX, or install g++)")
        try:
            import torch  # noqa: F401
        except ImportError:
            return self._without(library, "torch is not installed in the build environment (install it first, then --no-build-isolation)")
        result = subprocess.run(command(cxx, library, output), capture_output=True, text=True, check=False)
        if result.returncode:
            return self._without(library, f"the compiler said:\n{result.stderr[-4000:]}")
        return None

    def _without(self, library: Library, reason: str) -> None:
        print(
            f"megatron_patch: {library.name} was not built: {reason}\nThe plain formulas will serve; they give the same results, slower.",
            file=sys.stderr,
        )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[Extension(f"megatron_patch.{library.name}", list(library.sources), optional=True) for library in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries},
)
