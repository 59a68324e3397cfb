"""The Python API on several ranks: one run after another in the same processes, with another layout each, also after a failed one."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_patch.api import each_step, load_config, pretrain
from tests.api import own
from tests.api.runs import TINY, corpus_in, left_threads, process_state
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
LAYOUTS = ({"pipeline_model_parallel_size": 2}, {"zero_stage": 3}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {})


def run_after_run(corpus):
    state, threads, losses = process_state(), set(threading.enumerate()), []

    def fail(record):
        raise ZeroDivisionError("on every rank")

    for layout in LAYOUTS:
        result = pretrain(load_config(TINY, data_path=corpus, **layout))
        losses.append((result.training_loss, result.token_loss))
        with pytest.raises(ZeroDivisionError):
            pretrain(load_config(TINY, data_path=corpus, **layout), callbacks=[each_step(fail)])
        now = process_state()
        assert {name for name in state if state[name] != now[name]} == set() and left_threads(threads) == []
    own_model = pretrain(load_config(TINY, data_path=corpus, tensor_model_parallel_size=2), model=own.same_model)
    losses.append((own_model.training_loss, own_model.token_loss))
    gc.collect()
    assert [type(one) for one in gc.get_objects() if type(one).__name__ in ("ProcessGroup", "DataParallelEngine")] == []
    return losses


def one_rank_fails(corpus):
    def fail(record):
        if int(os.environ["RANK"]) == 1 and record.step == 2:
            raise ZeroDivisionError("on rank 1")

    with pytest.raises(Exception) as caught:
        pretrain(load_config(TINY, data_path=corpus, save=f"{corpus}-run"), callbacks=[each_step(fail)])
    return type(caught.value).__name__


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_in(tmp_path_factory.mktemp("api"))


def test_layouts_follow_each_other_in_the_same_processes_with_equal_losses(corpus, tmp_path):
    first, second = run_ranks(run_after_run, 2, tmp_path / "logs", corpus)
    assert first == second and len(first) == len(LAYOUTS) + 1
    for pair in first:
        assert pair == pytest.approx(first[0], rel=1e-5)


def test_an_error_on_one_rank_ends_the_call_on_all_ranks(corpus, tmp_path):
    first, second = run_ranks(one_rank_fails, 2, tmp_path / "logs", corpus)
    assert second == "ZeroDivisionError" and first == "RuntimeError"
    assert "rank 1" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert "ZeroDivisionError" in Path(f"{corpus}-run", "events.jsonl").read_text()


SCRIPT = """
import sys
from megatron_patch.api import load_config, pretrain
from tests.api.runs import TINY

for patch_size in (4, 2):
    result = pretrain(load_config(TINY, data_path=sys.argv[1], patch_size=patch_size))
    print("finished", patch_size, result.finished, flush=True)
"""


@pytest.mark.slow
def test_a_script_trains_twice_under_a_launcher(corpus, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(tmp_path / "script.py"),
        corpus,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished 4 True") == done.stdout.count("finished 2 True") == 2
