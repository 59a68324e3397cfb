"""Failures during a run end with a clear message and lose no data."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.engine.environment import free_port
from tests.distributed.runs import DATA, MODEL, ROOT, Run, command, make_corpus, printed, start_process, train

PLAN = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 3000 --lr 3e-3 --save-interval 4")


def _with_small_files(argv: list[str]) -> int:
    from megatron_patch.training.pretrain import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return main(argv)


def test_no_space_left_keeps_the_checkpoints_before(tmp_path, corpus):
    """Files are limited to 100 kB while a run of two ranks saves: as on a full disk."""
    from tests.distributed.ranks import run_ranks

    whole = train(tmp_path / "whole", 2, PLAN, "--data-path", corpus)
    folder = tmp_path / "full"
    train(folder, 2, PLAN, "--exit-interval 5 --data-path", corpus)
    before = sorted(path.name for path in folder.glob("step-*"))
    argv = command(MODEL, DATA, PLAN, ["--data-path", corpus, "--save", str(folder)])
    codes = run_ranks(_with_small_files, 2, tmp_path / "full-logs", argv)
    assert codes == [4, 4], printed(folder)
    text = printed(folder)
    assert "cannot write" in text and "free space" in text and "Traceback" not in text
    assert (folder / "latest").read_text().strip() == before[-1]
    assert train(folder, 2, PLAN, "--data-path", corpus).losses == whole.losses


def test_a_damaged_newest_checkpoint_is_skipped_and_reported(tmp_path, corpus):
    whole = train(tmp_path / "whole", 2, PLAN, "--data-path", corpus)
    folder = tmp_path / "run"
    train(folder, 2, PLAN, "--exit-interval 9 --data-path", corpus)
    newest = sorted(folder.glob("step-*"))[-1]
    state = newest / "state-00001-of-00002.safetensors"
    data = bytearray(state.read_bytes())
    data[-20] ^= 1
    state.write_bytes(data)
    resumed = train(folder, 2, PLAN, "--data-path", corpus)
    assert f"skipped the checkpoint {newest}" in printed(folder) and "does not match its checksum" in printed(folder)
    assert resumed.losses == whole.losses


def test_data_too_small_for_a_block_is_refused(tmp_path):
    tiny = make_corpus(tmp_path / "tiny", documents=1)
    log = tmp_path / "log"
    code = start_process(PLAN, "--seq-length 512 --data-path", tiny, "--save", str(tmp_path / "run"), log=log).wait()
    assert code == 3 and "fewer than one block" in log.read_text() and "Traceback" not in log.read_text()


def test_data_read_more_than_once_is_reported(tmp_path):
    small = make_corpus(tmp_path / "small", documents=20)
    train(tmp_path / "run", 1, PLAN, "--data-path", small)
    assert "is read" in printed(tmp_path / "run") and "times" in printed(tmp_path / "run")


LAUNCHER = Path(sys.executable).parent / "deepspeed"
needs_launcher = pytest.mark.skipif(not LAUNCHER.exists(), reason="the deepspeed launcher is not installed next to this Python")


def launch(ranks: int, *parts: str | Sequence[str]) -> list[str]:
    """Returns the command line that a user would type."""
    words = [sys.executable, str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*words, str(ROOT / "pretrain_gpt_patch.py"), *command(MODEL, DATA, *parts)]


def children(process: int) -> list[int]:
    """Returns the ids of all descendants of a process."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}


@contextlib.contextmanager
def started(words: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Yields a job that has saved its first checkpoint into folder/run, and its log; the job is terminated afterwards."""
    log = folder / "log"
    with log.open("wb") as file:
        job = subprocess.Popen(words, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=file, cwd=folder)
    try:
        deadline = time.monotonic() + 200
        while not list((folder / "run").glob("step-*/manifest.json")):
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield job, log
    finally:
        job.terminate()
        job.wait()


@needs_launcher
@pytest.mark.parametrize("layout", ["--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"])
def test_a_rank_that_dies_ends_the_job(tmp_path, corpus, layout):
    """kill -9 on one rank during training: a minute later no rank is left, and the launcher's exit code is not 0."""
    words = launch(2, PLAN, layout, "--train-tokens 3M --data-path", corpus, ["--save", str(tmp_path / "run")])
    with started(words, tmp_path) as (job, log):
        ranks = [child for child in children(job.pid) if "--local_rank=1" in Path(f"/proc/{child}/cmdline").read_text()]
        everyone = [job.pid, *children(job.pid)]
        os.kill(ranks[-1], signal.SIGKILL)
        assert job.wait(timeout=60) != 0
        assert not [process for process in everyone if Path(f"/proc/{process}").exists()], log.read_text()


@needs_launcher
@pytest.mark.parametrize(("ranks", "layout"), [(2, "--zero-stage 3"), (4, "--pipeline-model-parallel-size 2")])
def test_an_error_on_one_rank_ends_the_job_with_its_message(tmp_path, ranks, layout):
    """An id outside of the vocabulary is written into the file: the rank that reads it reports its position, and all ranks end."""
    prefix = make_corpus(tmp_path / "walks")
    words = launch(ranks, PLAN, layout, "--train-tokens 3M --data-path", prefix, ["--save", str(tmp_path / "run")])
    with started(words, tmp_path) as (job, log):
        before = os.stat(f"{prefix}.bin")
        with open(f"{prefix}.bin", "r+b", buffering=0) as file:
            file.seek(18_000)
            file.write(np.full(3, 65, np.uint16).tobytes())
        os.utime(f"{prefix}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))  # otherwise all ranks would notice that the file has changed
        assert job.wait(timeout=60) != 0
        text = log.read_text()
        # A rank that reads just before the modification time is restored reports the change instead.
        assert "DataError" in text and ("token id 65" in text or "has changed since the run opened it" in text), text


@needs_launcher
def test_two_ranks_of_the_launcher_train_as_forked_ranks_do(tmp_path, corpus):
    forked = train(tmp_path / "forked", 2, PLAN, "--data-path", corpus)
    words = launch(2, PLAN, "--data-path", corpus, ["--save", str(tmp_path / "launched")])
    environment = {**os.environ, **ENVIRONMENT}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert Run(tmp_path / "launched").losses == forked.losses
    wrong = subprocess.run([*words, "--patchsize", "3"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert wrong.returncode != 0 and wrong.stderr.count("unknown flag --patchsize") == 1
