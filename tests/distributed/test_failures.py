"""What goes wrong while a run is under way ends with a sentence and loses nothing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port
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


def test_a_damaged_newest_checkpoint_is_skipped_and_told(tmp_path, corpus):
    whole = train(tmp_path / "whole", 2, PLAN, "--data-path", corpus)
    folder = tmp_path / "run"
    train(folder, 2, PLAN, "--exit-interval 9 --data-path", corpus)
    newest = sorted(folder.glob("step-*"))[-1]
    state = newest / "state-00001-of-00002.safetensors"
    data = bytearray(state.read_bytes())
    data[-20] ^= 1
    state.write_bytes(data)
    resumed = train(folder, 2, PLAN, "--data-path", corpus)
    assert f"skipped the checkpoint {newest}" in printed(folder) and "another checksum" in printed(folder)
    assert resumed.losses == whole.losses


def test_data_too_small_for_a_block_is_told(tmp_path):
    tiny = make_corpus(tmp_path / "tiny", documents=1)
    log = tmp_path / "log"
    code = start_process(PLAN, "--seq-length 512 --data-path", tiny, "--save", str(tmp_path / "run"), log=log).wait()
    assert code == 3 and "less than a block" in log.read_text() and "Traceback" not in log.read_text()


def test_data_read_more_than_once_is_told(tmp_path):
    small = make_corpus(tmp_path / "small", documents=20)
    train(tmp_path / "run", 1, PLAN, "--data-path", small)
    assert "is read" in printed(tmp_path / "run") and "times" in printed(tmp_path / "run")


@pytest.mark.skipif(not (Path(sys.executable).parent / "deepspeed").exists(), reason="the deepspeed launcher is not beside this Python")
def test_the_launcher_s_two_ranks_give_what_forked_ranks_give(tmp_path, corpus):
    forked = train(tmp_path / "forked", 2, PLAN, "--data-path", corpus)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / "pretrain_gpt_patch.py")]
    words += command(MODEL, DATA, PLAN, ["--data-path", corpus, "--save", str(tmp_path / "launched")])
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
    result = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert Run(tmp_path / "launched").losses == forked.losses
    wrong = subprocess.run(
        [*launcher, *words, "--patchsize", "3"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert wrong.returncode != 0 and "unknown flag --patchsize" in wrong.stderr
