"""benchmarks/loss_harness.cu: its checks, run on the CPU, pass and find errors in the kernels; without a GPU it reports that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_on_cpu import kernels
from tests.cuda_on_cpu.kernels import OPTIONS, cuda_include

ROOT = Path(__file__).parent.parent.parent
HARNESS = ROOT / "benchmarks" / "loss_harness.cu"
pytestmark = pytest.mark.skipif(cuda_include() is None or shutil.which("g++") is None, reason="CUDA's headers (nvcc) and g++ are needed")


def run_checks(sources: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The harness' checks on short rows, of the kernels in a folder."""
    program = folder / "harness"
    includes = ("-I", kernels.HERE, "-I", sources, "-isystem", cuda_include())
    subprocess.run(["g++", *OPTIONS, *includes, "-x", "c++", HARNESS, "-o", program], check=True)
    return subprocess.run([program, "--small", "--check-only"], capture_output=True, text=True)


def test_the_kernels_pass_its_checks(tmp_path):
    done = run_checks(kernels.SOURCES, tmp_path)
    assert done.returncode == 0 and "checks: 0 wrong" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "replacement", "noticed"),
    [
        ("taken += weight(other);", "taken += other == k ? weight(other) : 0;", "gradient in one go"),
        pytest.param("if (at_labels[other].column < 0) continue;", "", "loss", marks=pytest.mark.slow),
        pytest.param("target[0] = whole.largest;", "target[0] = whole.largest + 1;", "largest", marks=pytest.mark.slow),
    ],
)
def test_its_checks_see_what_is_wrong(tmp_path, text, replacement, noticed):
    folder = tmp_path / "cuda"
    shutil.copytree(kernels.SOURCES, folder)
    source = folder / "multi_token_loss.cu"
    assert text in source.read_text(), "multi_token_loss.cu no longer contains the text of this mutant; update the mutant"
    source.write_text(source.read_text().replace(text, replacement))
    done = run_checks(folder, tmp_path)
    assert done.returncode == 1 and f"WRONG: {noticed}" in done.stderr, done.stderr


def test_without_a_gpu_one_line_says_so():
    command = [sys.executable, ROOT / "benchmarks" / "loss_variants.py", "--only", "default"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("loss_harness: there is no CUDA device") and done.stderr.count("\n") == 1
