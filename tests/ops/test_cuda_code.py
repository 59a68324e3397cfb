"""The PTX of the CUDA kernels: each vector is loaded and stored by one instruction. A failure costs only bandwidth, which the CPU cannot show."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.cuda_on_cpu.kernels import SOURCES

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
# Kernel, its template's arguments, and whether it writes vectors: statistics are 2 + K numbers a row.
KERNELS = [
    ("multi_token_loss.cu", r"statistics_kernelI{}E", False),
    ("multi_token_loss.cu", r"loss_and_gradient_kernelI{}Lb0E", True),
    ("multi_token_loss.cu", r"\dgradient_kernelI{}E", True),
    ("patch_embedding.cu", r"forward_kernelI{}Li{}E", True),
    ("patch_embedding.cu", r"tile_kernelI{}Li{}E", True),
    ("patch_embedding.cu", r"join_kernelI{}Li{}E", True),
]
TYPES = {"f": 4, "13__nv_bfloat16": 8, "6__half": 8}


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> dict[str, dict[str, str]]:
    """File -> kernel's mangled name -> its PTX."""
    folder, found = tmp_path_factory.mktemp("ptx"), {}
    for path in SOURCES.glob("*.cu"):
        subprocess.run(["nvcc", "-ptx", "-O3", "-std=c++17", "-arch=compute_80", path, "-o", folder / "code.ptx"], check=True)
        parts = (folder / "code.ptx").read_text().split(".entry ")[1:]
        found[path.name] = {part.partition("(")[0].strip(): part for part in parts}
    return found


@pytest.mark.parametrize(("file", "pattern", "writes"), KERNELS)
@pytest.mark.parametrize("number", TYPES)
def test_vectors_are_read_and_written_16_bytes_at_a_time(code, file, pattern, writes, number):
    (kernel,) = (text for name, text in code[file].items() if re.search(pattern.format(number, TYPES[number]), name))
    assert re.search(r"ld\.global(\.nc)?\.v4\.[uf]32", kernel)
    if writes:
        assert re.search(r"st\.global(\.wb)?\.v4\.[uf]32", kernel)
    if file == "patch_embedding.cu":
        assert not re.search(r"st\.global\S*\.[uf](16|32)\s+\[", re.sub(r"\.v4\.[uf]32", "", kernel)), "and never number by number"
