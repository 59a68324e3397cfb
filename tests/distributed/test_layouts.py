"""Tensor and pipeline parallelism give the results of one process, across the switch."""

from __future__ import annotations

import json

import pytest

from tests.distributed.matrix import Combination, combinations, compare
from tests.distributed.runs import command, make_corpus, train

QUICK = [
    Combination(2, 1, 2, sequence=True, zero=3, model="tied", length="tokens"),
    Combination(2, 1, 2, zero=2),
    Combination(4, 1, 1, sequence=True, model="qwen3, one group"),
    Combination(2, 1, 1, zero=0, length="tokens"),
    Combination(1, 2, 2, zero=1, model="tied", extra="--recompute-granularity full"),
    Combination(1, 3, 1, zero=0, length="tokens"),
    Combination(1, 4, 1, zero=1, model="gpt2"),
    Combination(2, 2, 1, sequence=True, zero=1, length="tokens"),
    Combination(2, 2, 1, zero=0, model="tied"),
    Combination(1, 2, 1, zero=1, model="tied", extra="--bf16"),
]


@pytest.mark.parametrize("combination", QUICK, ids=str)
def test_a_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


@pytest.mark.slow
@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_every_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (3, "--decoupled-lr 1e-3"),  # the rank in the middle has no word embeddings, which have a rate of their own
        # The first rank has learned positions in addition; the tied embedding must stay equal to the last bit.
        (2, "--decoupled-lr 1e-3 --optimizer muon --model-family gpt2 --clip-grad 0.1 --check-replicas-interval 1"),
    ],
)
def test_pipeline_ranks_that_have_different_parameter_groups(tmp_path, corpus, ranks, words):
    plan = f"--seq-length 16 --global-batch-size 12 --patch-size 4 --train-tokens 1536 --num-layers 3 --lr 3e-3 {words}"
    single, run = (
        train(tmp_path / f"{size}", size, plan, f"--pipeline-model-parallel-size {size} --hang-timeout 2min --data-path", corpus)
        for size in (1, ranks)
    )
    assert len(run.losses) == 8 and run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(single.values("grad_norm"), rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--zero-stage 3"),
        (3, "--pipeline-model-parallel-size 3"),
        (4, "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2"),
    ],
)
def test_micro_batches_that_change_at_the_switch_with_a_blend_of_held_out_data(tmp_path, corpus, ranks, layout):
    """From micro-batches of 1 sample to micro-batches of 6, fewer than pipeline ranks, with an evaluation after every step."""
    stages = [{"patch_size": 4, "steps": 4, "micro_batch_size": 1}, {"patch_size": 1, "steps": 4, "micro_batch_size": 6}]
    plan = command("--seq-length 16 --global-batch-size 12 --lr 3e-3 --num-layers 3 --eval-interval 1 --stages", [json.dumps(stages)])
    plan += ["--valid-data-path", "0.9", corpus, "0.1", make_corpus(tmp_path / "other", documents=9, seed=1)]
    single = train(tmp_path / "single", 1, plan, "--zero-stage 0 --data-path", corpus)
    run = train(tmp_path / "run", ranks, plan, layout, "--data-path", corpus)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(single.values("grad_norm"), rel=1e-4)
    evaluations = list(zip(run.records("evaluation"), single.records("evaluation"), strict=True))
    assert len(evaluations) == 8
    for ours, expected in evaluations:
        assert list(ours["corpora"]) == ["walks", "other"]
        for one, other in [(ours, expected), *((ours["corpora"][name], part) for name, part in expected["corpora"].items())]:
            assert [one[key] for key in ("token_loss", "patch_loss")] == pytest.approx([other["token_loss"], other["patch_loss"]], rel=1e-5)
            assert one["eval_tokens"] == other["eval_tokens"]
