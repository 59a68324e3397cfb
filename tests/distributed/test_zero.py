"""ZeRO 0, 1, 2 and 3 on two ranks give the results of one process, across the switch, in float32 and in bfloat16."""

from __future__ import annotations

import json

import pytest

from tests.distributed.gradients import FLOAT32_ERROR, checked_program, gradient_errors
from tests.distributed.runs import Run, start_program, train

# On two ranks a step has 1 micro-batch per rank in the patch stage and 3 in the token stage.
PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 4200 --lr 3e-3 --lr-warmup-fraction 0.2"


@pytest.fixture(scope="module")
def single(tmp_path_factory, corpus) -> Run:
    return train(tmp_path_factory.mktemp("single") / "run", 1, PLAN, "--zero-stage 0 --eval-interval 5 --data-path", corpus)


def test_the_reference_crosses_the_switch_and_learns(single):
    sizes = single.values("patch_size")
    assert len(sizes) >= 20 and sizes[0] == 3 and sizes[-1] == 1
    assert single.losses[-1] < single.losses[0] - 0.3


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(tmp_path, corpus, single, zero):
    run = train(tmp_path / "run", 2, PLAN, f"--zero-stage {zero} --eval-interval 5 --data-path", corpus)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(single.values("grad_norm"), rel=1e-4)
    for ours, expected in zip(run.records("evaluation"), single.records("evaluation"), strict=True):
        assert ours["token_loss"] == pytest.approx(expected["token_loss"], rel=1e-5)
        assert ours["patch_loss"] == pytest.approx(expected["patch_loss"], rel=1e-5)
        assert ours["eval_tokens"] == expected["eval_tokens"]


def _on_a_processor_without_float16(argv: list[str]) -> int:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    return start_program(argv)


def test_sharded_weights_have_the_requested_precision_on_any_processor(tmp_path, corpus, single):
    words = "--zero-stage 3 --eval-interval 5 --exit-interval 4 --data-path"
    run = train(tmp_path / "run", 2, PLAN, words, corpus, main=_on_a_processor_without_float16)
    assert run.losses == pytest.approx(single.losses[:4], rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bfloat16_stays_close_to_float32(tmp_path, corpus, single, zero):
    words = f"--zero-stage {zero} --bf16 --clip-grad 0 --eval-interval 5 --data-path"
    run = train(tmp_path / "run", 2, PLAN, words, corpus, main=checked_program)
    assert max(gradient_errors(run, 2).values()) < FLOAT32_ERROR, "no gradient may be rounded below float32 on its way to the optimizer"
    assert run.losses == pytest.approx(single.losses, rel=1e-2)
    assert run.losses != pytest.approx(single.losses, rel=1e-6), "bfloat16 must have been used"


def test_three_ranks_fill_up_the_last_micro_batch(tmp_path, corpus, single):
    run = train(tmp_path / "run", 3, PLAN, "--zero-stage 1 --micro-batch-size 3 --eval-interval 5 --data-path", corpus)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("zero", "parts"),
    [(1, ["offload_optimizer"]), (2, ["offload_optimizer"]), (3, ["offload_optimizer"]), (3, ["offload_param", "offload_optimizer"])],
)
def test_offloaded_training_gives_the_same_losses_and_resumes(tmp_path, corpus, single, zero, parts):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": zero, **{part: {"device": "cpu"} for part in parts}}}))
    words = f"--eval-interval 5 --deepspeed_config {path}"
    train(tmp_path / "run", 2, PLAN, words, "--exit-interval 17 --data-path", corpus)
    run = train(tmp_path / "run", 2, PLAN, words, "--data-path", corpus)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
