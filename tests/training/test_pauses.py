"""The remaining time includes the evaluations and saves to come, counted as the trainer's loop does them."""

from __future__ import annotations

import pytest

from megatron_patch.config.resolve import load_config
from megatron_patch.training.pauses import Interval, Pauses

FLAGS = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--vocab-size", "64", "--dry-run", "--seq-length", "16"),
    *("--micro-batch-size", "2", "--global-batch-size", "12", "--patch-size", "3", "--train-tokens", "4200"),
]


def done_by_the_loop(plan, steps, tokens):
    """Returns the steps after which `Trainer._train_stage` does what has this interval: (stage, step of the stage) in order."""
    found = []
    for index, stage in enumerate(plan.stages):
        for step in range(1, stage.steps + 1):
            now = plan.first_token(index) + step * stage.tokens_per_step
            if steps is not None:
                due = (plan.first_step(index) + step) % steps == 0
            else:
                due = tokens is not None and now // tokens > (now - stage.tokens_per_step) // tokens
            if due or step == stage.steps:
                found.append((index, step))
    return found


@pytest.mark.parametrize(
    ("steps", "tokens"), [(1, None), (4, None), (5, 7), (100, None), (None, 1), (None, 192), (None, 500), (None, 10**6), (None, None)]
)
def test_what_is_to_come_is_what_the_loop_will_do(steps, tokens):
    plan = load_config(FLAGS, 1).plan
    assert [stage.steps for stage in plan.stages] == [15, 7]
    found = done_by_the_loop(plan, steps, tokens)
    for index, stage in enumerate(plan.stages):
        for after in range(stage.steps + 1):
            expected = sum(one == index and step > after for one, step in found)
            assert Interval(steps, tokens).count(plan, index, after) == expected


def test_pauses_take_what_they_took_before():
    run = load_config([*FLAGS, "--eval-interval", "5", "--save-interval", "10"], 1)
    pauses = Pauses(run.plan, run.options)
    assert pauses.ahead(5, 0) == (0.0, 0.0), "nothing is measured yet"
    # Two passes of K = 1 and K = 3 in four seconds: three of them at K = 1.
    pauses.add_evaluation(5, 3, 4.0)
    pauses.add_samples(1.0)
    pauses.add_save(5, 2.0)
    # Evaluations after steps 10 and 15; then 20 and 22, in the stage without a second K. Saves after 10 and 15, then 20 and 22.
    assert pauses.ahead(5, 0) == pytest.approx((2 * (4 + 1) + 2 * 2, 2 * (4 + 1) + 2 * 2 + 2 * (3 + 1) + 2 * 2))
    assert pauses.ahead(10, 0)[0] == pytest.approx(2 * (4 + 1) + 2 * 2), "those of this step are still to come"
    pauses.add_evaluation(10, 3, 4.0)
    pauses.add_save(10, 2.0)
    assert pauses.ahead(10, 0)[0] == pytest.approx(4 + 1 + 2)
    pauses.add_evaluation(22, 1, 3.0)
    pauses.add_save(22, 2.0)
    assert pauses.ahead(22, 1) == (0.0, 0.0)
