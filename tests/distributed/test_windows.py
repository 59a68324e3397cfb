"""Runs with windows and blocks without rotation, in several layouts and across the switch, give what one process with dense masks gives."""

from __future__ import annotations

import pytest

from tests.distributed.runs import train
from tests.distributed.test_documents import LENGTHS, dense_runs, differences

PLAN = "--seq-length 48 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --num-layers 4 --lr 3e-3 --eval-interval 1"
PLAN += " --window-size 4,0 --window-attn-skip-freq 3 --no-rope-freq [0,1,1,0]"
DOCUMENTS = "--eod-token-id 63 --reset-attention-mask --reset-position-ids --eod-mask-loss"


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    return dense_runs(tmp_path_factory, corpus, PLAN)


@pytest.mark.parametrize(
    ("layout", "length", "more"),
    [
        ("--zero-stage 3 --recompute-granularity full --replay-interval 5", "positions", ""),
        ("--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective", "tokens", ""),
        ("--pipeline-model-parallel-size 2", "positions", DOCUMENTS),
    ],
)
def test_a_layout_equals_one_process_with_dense_masks(tmp_path, corpus, dense, layout, length, more):
    words = f"{LENGTHS[length]} {more}"
    run = train(tmp_path / "run", 2, PLAN, words, layout, "--data-path", corpus)
    assert len({record["patch_size"] for record in run.records("step")}) == 2 and len(run.records("evaluation")) >= 10
    found = differences(run, dense(words))
    assert max(found.values()) < 2e-6, found
