"""Rejected steps on real ranks: a gradient of NaN on one rank and a loss that spikes, under every layout."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from megatron_patch.cli import show_step
from megatron_patch.data.corpus import open_corpus
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import DataError
from tests.distributed.gradients import float16_program
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, printed, start_program, train
from tests.oracle.reference_muon import start_with_reference

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 7680 --lr 3e-3 --spike-window 8"
STEP = 14  # of the patch stage's 27
LAYOUTS = {
    "ZeRO 0": (2, "--zero-stage 0"),
    "ZeRO 1": (2, "--zero-stage 1"),
    "ZeRO 2": (2, "--zero-stage 2"),
    "ZeRO 3": (2, "--zero-stage 3"),
    "ZeRO 1 bf16": (2, "--zero-stage 1 --bf16"),
    "ZeRO 2 bf16": (2, "--zero-stage 2 --bf16"),
    "ZeRO 0 bf16": (2, "--zero-stage 0 --bf16"),
    "TP2": (2, "--tensor-model-parallel-size 2 --zero-stage 1"),
    "PP2": (2, "--pipeline-model-parallel-size 2 --zero-stage 1"),
    "PP2 ZeRO 0": (2, "--pipeline-model-parallel-size 2 --zero-stage 0"),
}


def _poisoned(argv, kind, steps=(STEP,), program=start_program):
    """The program with poisoned steps: a `gradient` of NaN on the last rank only, or a `loss` a thousand times too large."""
    from megatron_patch.model.gpt import GPTModel
    from megatron_patch.training import trainer

    forward, current = GPTModel.forward, {}
    rank, size = torch.distributed.get_rank, torch.distributed.get_world_size

    def poisoned_forward(self, inputs, labels, *more, **further):
        result = forward(self, inputs, labels, *more, **further)
        if current.get("step") not in steps or not self.training or labels is None:
            return result
        if kind == "gradient" and rank() == size() - 1:
            result[0].register_hook(lambda grad: grad * float("nan"))
        return (result[0] * 1000, result[1]) if kind == "loss" else result

    check = trainer.Trainer._check_consistency

    def note(self, micro_batches):
        current["step"] = self.step + 1
        return check(self, micro_batches)

    GPTModel.forward, trainer.Trainer._check_consistency = poisoned_forward, note
    return program(argv)


def poisoned(folder, ranks, kind, *parts, expect=0, steps=(STEP,), program=start_program):
    argv = command(MODEL, DATA, PLAN, *parts, ["--save", str(folder)])
    function = functools.partial(_poisoned, kind=kind, steps=steps, program=program)
    codes = run_ranks(function, ranks, folder.parent / f"{folder.name}-logs", argv)
    assert codes == [expect] * ranks, printed(folder)
    return Run(folder)


def events(run, kind):
    found = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["type"] == kind]


def check(run):
    records = run.records("step")
    assert [record["step"] for record in records if record["skipped"]] == [STEP]
    (event,) = events(run, "skip")
    assert event["step"] == STEP and len(event["spans"]) == 3 and all(length == 64 for _, _, length in event["spans"])
    after = [record["loss"] for record in records[STEP:]]
    assert all(loss is not None for loss in after)
    return event


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, corpus):
    """The losses of one process that rejects the step, by the kind of poison."""
    return {
        kind: poisoned(tmp_path_factory.mktemp("single") / kind, 1, kind, "--zero-stage 0 --data-path", corpus).values("loss")
        for kind in ("gradient", "loss")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_nan_on_one_rank_changes_no_weight(tmp_path, corpus, skipped, layout):
    ranks, words = LAYOUTS[layout]
    run = poisoned(tmp_path / "run", ranks, "gradient", words, "--data-path", corpus)
    assert "norm" in check(run)["reason"]
    losses, expected = run.values("loss"), skipped["gradient"]
    assert losses == pytest.approx(expected, rel=1e-2 if "bf16" in layout else 1e-5)


@pytest.mark.parametrize("layout", ["ZeRO 0", "ZeRO 1", "ZeRO 3", "ZeRO 1 bf16", "PP2"])
def test_a_step_with_a_loss_spike_is_rejected(tmp_path, corpus, skipped, layout):
    ranks, words = LAYOUTS[layout]
    run = poisoned(tmp_path / "run", ranks, "loss", words, "--data-path", corpus)
    assert "the loss spikes" in check(run)["reason"]
    losses, expected = run.values("loss"), skipped["loss"]
    assert losses == pytest.approx(expected, rel=1e-2 if "bf16" in layout else 1e-5)


@pytest.fixture(scope="module")
def skipped_with_muon(tmp_path_factory, corpus):
    """The losses of one process that rejects the step and otherwise steps with torch's Muon."""
    folder = tmp_path_factory.mktemp("muon") / "run"
    return poisoned(folder, 1, "loss", "--optimizer muon --zero-stage 0 --data-path", corpus, program=start_with_reference).losses


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("ZeRO 0", "gradient"),
        ("ZeRO 1", "loss"),
        ("ZeRO 3", "gradient"),
        ("PP2", "loss"),
        pytest.param("ZeRO 1 bf16", "gradient", marks=pytest.mark.slow),
    ],
)
def test_a_rejected_step_leaves_momentum_as_it_is(tmp_path, corpus, skipped_with_muon, layout, kind):
    ranks, words = LAYOUTS[layout]
    run = poisoned(tmp_path / "run", ranks, kind, "--optimizer muon", words, "--data-path", corpus)
    check(run)
    # The poisoned loss itself is not compared.
    tolerance = 1e-2 if "bf16" in layout else 1e-5
    assert run.losses[: STEP - 1] + run.losses[STEP:] == pytest.approx(
        skipped_with_muon[: STEP - 1] + skipped_with_muon[STEP:], rel=tolerance
    )


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_overflow_in_float16_leaves_momentum_as_it_is(tmp_path, corpus, zero):
    """The loss scale is too large for some gradients. One process in float32 that rejects the same steps has the same losses up to rounding."""
    words = f"--optimizer muon --fp16 --initial-loss-scale {2**18} --zero-stage {zero} --data-path"
    run = poisoned(tmp_path / "run", 2, "gradient", words, corpus, steps=(), program=float16_program)
    overflows = [record["step"] for record in run.records("step") if record["skipped"]]
    assert 1 <= len(overflows) <= 8 and overflows[0] < len(run.losses) // 2
    words = ("--optimizer muon --zero-stage 0 --data-path", corpus)
    single = poisoned(tmp_path / "single", 1, "gradient", *words, steps=tuple(overflows), program=start_with_reference)
    assert run.losses == pytest.approx(single.losses, rel=1e-2) and run.losses != pytest.approx(single.losses, rel=1e-6)


def test_only_the_rejected_step_makes_a_difference(tmp_path, corpus, skipped):
    whole = train(tmp_path / "whole", 1, PLAN, "--zero-stage 0 --data-path", corpus)
    for losses in skipped.values():
        assert losses[: STEP - 1] == whole.losses[: STEP - 1]
        assert losses[STEP:] != whole.losses[STEP:]
    assert skipped["gradient"][STEP - 1] == whole.losses[STEP - 1]
    assert skipped["loss"][STEP:] == skipped["gradient"][STEP:], "whatever the poison, the same update is skipped"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rewind_loads_the_newest_checkpoint_and_can_be_resumed(tmp_path, corpus, optimizer):
    words = (f"--optimizer {optimizer} --on-spike rewind --save-interval 5 --keep-last 0 --zero-stage 1 --data-path", corpus)
    run = poisoned(tmp_path / "run", 2, "loss", *words)
    (event,) = events(run, "rewind")
    assert event["step"] == STEP and event["to_step"] == 10 and event["left_out"] == 4
    assert "back to the weights and optimizer state of step 10" in printed(run.folder)
    # Stopped after the rewind and resumed, the run continues from there.
    poisoned(tmp_path / "again", 2, "loss", "--exit-interval 16", *words)
    again = poisoned(tmp_path / "again", 2, "loss", *words)
    assert again.losses == run.losses


def test_a_rewind_across_a_switch_repeats_the_switch(tmp_path, corpus):
    """The newest checkpoint is the end of the patch stage. A rewind to it in the third step of the token stage has the effect of skipping
    the two steps before, and the optimizer is new, as after the switch."""
    words = ("--zero-stage 1 --data-path", corpus)
    first = 28  # first step of the token stage
    run = poisoned(tmp_path / "run", 2, "gradient", "--on-spike rewind", *words, steps=(first + 2,))
    (event,) = events(run, "rewind")
    assert (event["to_step"], event["left_out"]) == (first - 1, 3)
    skipped = poisoned(tmp_path / "skipped", 2, "gradient", "--on-spike skip", *words, steps=(first, first + 1, first + 2))
    assert run.losses[first + 2 :] == skipped.losses[first + 2 :] and len(run.losses) > first + 4
    assert run.values("grad_norm")[first + 2 :] == skipped.values("grad_norm")[first + 2 :]


@pytest.mark.slow
def test_a_rewind_takes_the_balance_of_experts_back(tmp_path, corpus):
    """It has the effect of skipping the steps since the checkpoint, none of which moved a load or a bias."""
    experts = "--num-experts 4 --moe-ffn-hidden-size 16 --moe-aux-loss-coeff 0.05 --expert-model-parallel-size 2"
    experts += " --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01 --save-interval 5 --exit-interval 20"
    words = (experts, "--zero-stage 1 --data-path", corpus)
    run = poisoned(tmp_path / "run", 2, "gradient", "--on-spike rewind", *words)
    (event,) = events(run, "rewind")
    assert (event["step"], event["to_step"]) == (STEP, 10)
    skipped = poisoned(tmp_path / "skipped", 2, "gradient", "--on-spike skip", *words, steps=(11, 12, 13, STEP))
    for name in ("loss", "expert_load", "router_entropy"):
        assert run.values(name)[STEP:] == skipped.values(name)[STEP:]
    found, expected = (load_model(str(one.folder)).model.state_dict() for one in (run, skipped))
    for name in ("load", "bias"):
        state = f"blocks.1.feed_forward.router.balance.{name}"
        assert torch.equal(found[state], expected[state]) and float(expected[state].std()) > 0


def test_on_spike_stop_ends_with_its_own_exit_code(tmp_path, corpus):
    run = poisoned(tmp_path / "run", 2, "loss", "--on-spike stop --zero-stage 1 --data-path", corpus, expect=5)
    assert "the loss spikes" in printed(run.folder) and "exit code 5" in printed(run.folder)


def test_a_resumed_run_rejects_what_an_uninterrupted_one_rejects(tmp_path, corpus, skipped):
    poisoned(tmp_path / "run", 2, "loss", f"--zero-stage 1 --exit-interval {STEP - 2} --data-path", corpus)
    run = poisoned(tmp_path / "run", 2, "loss", "--zero-stage 1 --data-path", corpus)
    assert run.losses == pytest.approx(skipped["loss"], rel=1e-5)
    check(run)


def test_the_data_of_a_rejected_step_can_be_shown(tmp_path, corpus, capsys):
    run = poisoned(tmp_path / "run", 1, "loss", "--zero-stage 0 --log-token-spans --data-path", corpus)
    assert show_step.main([str(run.folder), "--samples", "2"]) is None
    shown = capsys.readouterr().out
    summary = json.loads(shown.splitlines()[-1])
    assert summary["step"] == STEP and summary["samples"] == 3 and "the loss spikes" in shown
    (event,) = events(run, "skip")
    read = [json.loads(line) for line in (run.folder / "spans" / "rank-00000.jsonl").read_text().splitlines()]
    assert [span[1:] for batch in read[STEP - 1]["spans"] for span in batch] == [span[1:] for span in event["spans"]]
    ids = np.empty(64, dtype=np.int64)
    open_corpus(corpus).read_into(ids, event["spans"][0][1])
    assert " ".join(map(str, ids[:20].tolist())) in shown.replace("\n", " ")
    with pytest.raises(DataError, match="does not record the data of step 3"):
        show_step.main([str(run.folder), "--step", "3"])
