"""Families whose layers differ from Llama's, in several layouts and across the switch, give what one process gives."""

from __future__ import annotations

import functools

import pytest

from tests.distributed.runs import train
from tests.distributed.test_documents import differences

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 3072 --num-layers 3 --lr 2e-3 --adam-eps 1e-5"
PLAN += " --eval-interval 5"
MODELS = {
    "olmo2": "--model-family olmo2",
    "olmo2, one group": "--model-family olmo2 --num-query-groups 1",
    "gemma2": "--model-family gemma2 --window-size 4,0 --window-attn-skip-freq 2 --attn-logit-softcapping 1 --final-logit-softcapping 3 "
    "--eod-token-id 63 --reset-attention-mask --reset-position-ids",
    "gemma3": "--model-family gemma3 --window-size 4,0 --window-attn-skip-freq 3 --windowed-rotary-base 500 --query-pre-attn-scalar 9",
    "olmo3": "--model-family olmo3 --window-size 4,0 --window-attn-skip-freq 2 --windowed-rotary-base 500 --rope-scaling yarn "
    "--rope-scaling-factor 4 --rope-original-positions 8",
}


@pytest.fixture(scope="module")
def single(tmp_path_factory, corpus):
    """Returns the run of one process of a model; each is trained at its first use."""

    @functools.cache
    def run(model):
        return train(tmp_path_factory.mktemp("single") / "run", 1, PLAN, MODELS[model], "--zero-stage 0 --data-path", corpus)

    return run


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param("olmo2", "--tensor-model-parallel-size 2", marks=pytest.mark.slow),
        ("olmo2", "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full"),
        ("olmo2", "--zero-stage 3 --recompute-granularity full"),
        ("olmo2, one group", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("gemma2", "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective"),
        ("gemma2", "--pipeline-model-parallel-size 2 --zero-stage 1"),
        ("gemma2", "--context-parallel-size 2 --zero-stage 1"),
        pytest.param("gemma2", "--context-parallel-size 2 --cp-comm-type all_gather --zero-stage 2", marks=pytest.mark.slow),
        pytest.param("gemma3", "--context-parallel-size 2 --cp-comm-type all_gather --zero-stage 0", marks=pytest.mark.slow),
        pytest.param("olmo3", "--context-parallel-size 2 --zero-stage 3", marks=pytest.mark.slow),
        ("gemma3", "--tensor-model-parallel-size 2"),
        pytest.param("gemma3", "--zero-stage 3 --recompute-granularity full", marks=pytest.mark.slow),
        ("olmo3", "--pipeline-model-parallel-size 2 --zero-stage 1"),
    ],
)
def test_a_layout_equals_one_process(tmp_path, corpus, single, model, layout):
    run = train(tmp_path / "run", 2, PLAN, MODELS[model], layout, "--data-path", corpus)
    assert len({record["patch_size"] for record in run.records("step")}) == 2
    found, expected = differences(run, single(model)), single(model)
    assert run.values("grad_norm")[0] == pytest.approx(expected.values("grad_norm")[0], rel=1e-6)
    # Adam's division makes rounding errors of gradients larger from step to step.
    assert found.pop("grad_norm") < 1e-5
    assert max(found.values()) < 1e-6, found
