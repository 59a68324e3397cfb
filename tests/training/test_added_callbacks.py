"""Callbacks of a user's own script: factories that `main` passes on to every rank."""

from __future__ import annotations

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command, make_corpus

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 3072 --lr 3e-3 --eval-interval 4"


def _launcher(argv):
    """A user's script with a callback; returns what the callback saw on this rank."""
    import torch

    from megatron_patch.training.callbacks.base import Callback
    from megatron_patch.training.pretrain import main

    seen = []

    class Recorder(Callback):
        def __init__(self, context):
            self.context = context
            seen.append(("made", context.grid.rank, context.save.name, context.device.type, context.run.options.stages.patch_size))

        def on_step(self, record):
            seen.append(("step", record.step, record.patch_size))

        def on_evaluation(self, record):
            logits = self.context.logits(torch.zeros(1, 3, dtype=torch.long))
            seen.append(("logits", record.step, tuple(logits.shape), float(logits[0, -1].sum())))

        def on_end(self, record):
            seen.append(("end", record.step, record.reason))

        def close(self):
            seen.append(("closed",))

    assert main(argv, callbacks=[Recorder]) == 0
    return seen


def test_a_launcher_adds_a_callback_on_every_rank(tmp_path):
    corpus = make_corpus(tmp_path / "walks")
    argv = command(MODEL, DATA, PLAN, "--data-path", [corpus], ["--save", str(tmp_path / "run")])
    first, second = run_ranks(_launcher, 2, tmp_path / "logs", argv)
    assert [seen[0] for seen in (first, second)] == [("made", rank, "run", "cpu", 4) for rank in (0, 1)]
    assert first[1:] == second[1:], "records and logits are the same on every rank"
    steps = [seen[1] for seen in first if seen[0] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and {seen[2] for seen in first if seen[0] == "step"} == {4, 1}
    assert next(seen[2] for seen in first if seen[0] == "logits") == (1, 3, 64)
    assert first[-2:] == [("end", len(steps), "done"), ("closed",)]


def test_a_dry_run_makes_no_callback(capsys):
    from megatron_patch.training.pretrain import main

    assert main([*MODEL, *command(PLAN, "--dry-run")], callbacks=[lambda context: 1 / 0]) == 0
    assert "Stages" in capsys.readouterr().out
