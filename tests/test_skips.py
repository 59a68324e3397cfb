"""Skipped tests are listed with the command that lets them run, and fail a run of continuous integration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.skip(reason="Slurm is not installed (apt install …): slurmd missing")
def test_cluster(number):
    pass

def test_operator():
    pytest.skip("--deepspeed_config offloads to nvme, but DeepSpeed's operator async_io is not built")

@pytest.mark.skip(reason="needs a CUDA device")
def test_device():
    pass

def test_runs():
    pass
"""


def run(folder: Path, *words: str, ci: str = "") -> tuple[int, list[str]]:
    """Runs pytest on the folder with only this plugin, and returns (exit code, the last lines that it printed)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEGATRON_PATCH_CI": ci}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-p",
        "tests.skips",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        *words,
        str(folder),
    ]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_last_lines_say_what_was_skipped_and_what_lets_it_run(tmp_path, workers):
    (tmp_path / "test_them.py").write_text(TESTS)
    code, lines = run(tmp_path, "-n", workers)
    assert code == 0 and lines[-7:-1] == [
        "1 skipped: --deepspeed_config offloads to nvme, but DeepSpeed's operator async_io is not built",
        "    to run: apt-get install --no-install-recommends libaio-dev && make nvme",
        "2 skipped: Slurm is not installed (apt install …): slurmd missing",
        "    to run: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge",
        "1 skipped: needs a CUDA device",
        "    to run: python -m pytest -m gpu -n 0, on a machine with a GPU",
    ]
    code, lines = run(tmp_path, "-n", workers, ci="1")
    assert code == 1 and "3 of them fail this run, because MEGATRON_PATCH_CI is set" in lines


def test_a_machine_without_a_gpu_may_skip_its_tests(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    assert run(tmp_path, "-n", "0", "-k", "device or runs", ci="1")[0] == 0
