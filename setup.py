"""Builds csrc at install: the C++ compiler and nvcc are called directly on torch's stable ABI; without them the package works without csrc.

Three libraries: `_words` (the word cache of preprocessing) and `_C` (the operators' schemas and the CPU's kernels) wherever there is a C++
compiler, and `_C_cuda` where torch is a CUDA build and nvcc is found. MEGATRON_PATCH_CUDA=0 leaves the last one out, =1 demands it (with a
CPU build of torch, too: it loads where CUDA is); MEGATRON_PATCH_CUDA_ARCHS lists its GPU architectures. `torch.utils.cpp_extension` is not
used: it refuses CUDA sources beside a CPU build of torch, and guesses at toolkits. Nothing is ever compiled while the program runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
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

# Only what torch 2.11 had is used, so that the library loads in that and every later version.
TORCH_TARGET = "0x020b000000000000"
OLDEST_TORCH = (2, 11)


ARCHITECTURES = "80;90;100"
STABLE_ABI = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"


@dataclass(frozen=True)
class Library:
    """A shared library beside the package's modules: what it is made of (paths as setuptools wants them), what serves without."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    otherwise: str = "The plain formulas serve: the same results, slower."


LIBRARIES = (
    Library("_words", ("csrc/cpu/word_cache.cpp",), (), "Preprocessing caches no words: the same tokens, more slowly for SentencePiece."),
    Library(
        "_C",
        ("csrc/schemas.cpp", "csrc/cpu/bindings.cpp", "csrc/cpu/patch_embedding.cpp", "csrc/cpu/multi_token_loss.cpp"),
        ("csrc/arguments.h", "csrc/cpu/patch_embedding.h", "csrc/cpu/multi_token_loss.h"),
    ),
    Library(
        "_C_cuda",
        ("csrc/cuda/bindings.cpp", "csrc/cuda/patch_embedding.cu", "csrc/cuda/multi_token_loss.cu"),
        ("csrc/arguments.h", "csrc/cuda/launch.h", "csrc/cuda/common.cuh"),
    ),
)


class NotWanted(Exception):
    """Why a library has no business here: nothing to warn of."""


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


def torch_cuda() -> str | None:
    """The CUDA version that torch was built with, or None."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def call(*command: str) -> str:
    """Runs a compiler; its messages go to the build's log."""
    print(shlex.join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CannotBuild(f"the compiler failed ({shlex.join(command)}):\n{(result.stdout + result.stderr)[-4000:]}")
    sys.stderr.write(result.stderr)
    return result.stdout


def torch_headers() -> tuple[str, ...]:
    """Options for torch's headers, whose warnings are not ours."""
    include = torch_folder() / "include"
    return ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"))


def torch_libraries() -> tuple[str, ...]:
    """Options to link with torch."""
    return (f"-L{torch_folder() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")


def build_cpu(library: Library, output: Path, _: Path) -> None:
    """One call of the C++ compiler."""
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
    """One call of the C++ compiler, without torch."""
    call(
        *compiler(), "-shared", "-fPIC", "-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden", *library.sources, "-o", str(output)
    )


def check_cuda_wanted() -> None:
    """Whether `_C_cuda` belongs here.

    Raises:
        NotWanted: MEGATRON_PATCH_CUDA=0, or a CPU build of torch.
        CannotBuild: it is wanted and there is no nvcc, or one whose CUDA is not torch's.
    """
    wish = os.environ.get("MEGATRON_PATCH_CUDA")
    if wish not in (None, "", "0", "1"):
        raise CannotBuild(f"MEGATRON_PATCH_CUDA is {wish!r}; allowed: 0 and 1")
    if wish == "0":
        raise NotWanted("MEGATRON_PATCH_CUDA is 0")
    if wish != "1" and torch_cuda() is None:
        raise NotWanted("torch is a CPU build")
    if shutil.which("nvcc") is None:
        raise CannotBuild("there is no nvcc; install the CUDA toolkit, and put its bin folder on PATH")
    # Each major version has a runtime library of its own; only that of torch is sure to be there when the library is loaded.
    found, theirs = re.search(r"release (\d+)", call("nvcc", "--version")), torch_cuda()
    if found and theirs and theirs.split(".")[0] != found[1]:
        raise CannotBuild(f"nvcc is of CUDA {found[1]} and torch of CUDA {theirs}; put an nvcc of torch's major version first on PATH")


def architectures() -> list[str]:
    """The GPU architectures to build for: those asked for that this nvcc knows."""
    wanted = [name for name in re.split(r"[;,\s]+", os.environ.get("MEGATRON_PATCH_CUDA_ARCHS", ARCHITECTURES)) if name]
    known = re.findall(r"compute_(\d+\w?)", call("nvcc", "--list-gpu-arch"))
    found = [name for name in wanted if name in known]
    if not found:
        raise CannotBuild(f"nvcc knows none of the GPU architectures {' '.join(wanted)}; it knows {' '.join(known)}")
    return found


def build_cuda(library: Library, output: Path, work: Path) -> None:
    """Each source by nvcc, side by side, then one link. The kernels know nothing of torch, so that they compile in seconds."""
    check_cuda_wanted()
    names = architectures()
    # Machine code for each, and what newer GPUs can translate when the library is loaded.
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
    # torch's libraries are named as needed although the linker sees no symbol of some: without them it loads nowhere.
    call(
        *("nvcc", "-shared", "-cudart", "shared", "-Xlinker", "--no-as-needed"),
        *objects,
        *torch_libraries(),
        *("-o", str(output)),
    )


BUILDERS = {"_words": build_words, "_C": build_cpu, "_C_cuda": build_cuda}


def build(library: Library, output: Path) -> None:
    """Makes a library under a temporary name until it is whole."""
    unfinished = output.with_suffix(".tmp")
    try:
        with tempfile.TemporaryDirectory() as work:
            BUILDERS[library.name](library, unfinished, Path(work))
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
        except (CannotBuild, NotWanted) as reason:
            # What an earlier build left must not pass for this one's.
            output.unlink(missing_ok=True)
            if self.beside_modules:
                Path("megatron_patch", output.name).unlink(missing_ok=True)
            if isinstance(reason, NotWanted):
                print(f"{library.name} is not built: {reason}")
                return
            if library.name == "_C_cuda" and os.environ.get("MEGATRON_PATCH_CUDA") == "1":
                raise
            # pip shows a build's warnings, and hides what it prints.
            warnings.warn(f"megatron_patch: {library.name} is not built: {reason}\n{library.otherwise}", stacklevel=1)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[
        Extension(f"megatron_patch.{library.name}", list(library.sources), depends=list(library.headers), optional=True)
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildLibraries},
)
