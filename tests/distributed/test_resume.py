"""A run that was stopped, killed or moved to another layout resumes with the results of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from megatron_patch.data.corpus import split_ranges
from tests.distributed.ranks import run_ranks, start_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, ledger, printed, start_program, train

PLAN = command(
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 4200 --lr 3e-3 --lr-warmup-fraction 0.2",
    "--save-interval 3 --eval-interval 7 --keep-last 0 --log-token-spans",
)
SWITCH = 15  # steps of the patch stage; checked below


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus) -> Run:
    run = train(tmp_path_factory.mktemp("unbroken") / "run", 2, PLAN, "--zero-stage 1 --data-path", corpus)
    assert run.records("switch")[0]["step"] == SWITCH
    return run


@pytest.mark.parametrize("stop", [4, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 4])
def test_resuming_anywhere_is_bit_identical(tmp_path, corpus, unbroken, stop):
    folder = tmp_path / "run"
    train(folder, 2, PLAN, f"--zero-stage 1 --exit-interval {stop} --data-path", corpus)
    assert Run(folder).values("step")[-1] == stop
    resumed = train(folder, 2, PLAN, "--zero-stage 1 --data-path", corpus)
    assert resumed.losses == unbroken.losses
    assert resumed.values("grad_norm") == unbroken.values("grad_norm")
    assert [e["token_loss"] for e in resumed.records("evaluation")] == [e["token_loss"] for e in unbroken.records("evaluation")]


@pytest.mark.parametrize(
    ("ranks", "zero", "then_ranks", "then_zero"),
    [(2, 1, 1, 0), (1, 0, 2, 2), (2, 3, 3, 1), (2, 2, 2, 3), (2, 0, 2, 3)],
)
def test_another_layout_resumes_with_the_same_batches(tmp_path, corpus, unbroken, ranks, zero, then_ranks, then_zero):
    folder = tmp_path / "run"
    train(folder, ranks, PLAN, f"--zero-stage {zero} --exit-interval {SWITCH + 2} --data-path", corpus)
    resumed = train(folder, then_ranks, PLAN, f"--zero-stage {then_zero} --data-path", corpus)
    assert resumed.losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert resumed.values("lr") == unbroken.values("lr")


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_bfloat16_resumes_bit_for_bit(tmp_path, corpus, zero):
    whole = train(tmp_path / "whole", 2, PLAN, f"--bf16 --zero-stage {zero} --data-path", corpus)
    train(tmp_path / "run", 2, PLAN, f"--bf16 --zero-stage {zero} --exit-interval {SWITCH + 1} --data-path", corpus)
    assert train(tmp_path / "run", 2, PLAN, f"--bf16 --zero-stage {zero} --data-path", corpus).losses == whole.losses


def test_bfloat16_moves_between_layouts_without_losing_its_master_weights(tmp_path, corpus):
    whole = train(tmp_path / "whole", 2, PLAN, "--bf16 --zero-stage 2 --data-path", corpus)
    train(tmp_path / "run", 2, PLAN, f"--bf16 --zero-stage 2 --exit-interval {SWITCH + 1} --data-path", corpus)
    same = train(tmp_path / "run", 2, PLAN, "--bf16 --zero-stage 2 --data-path", corpus)
    assert same.losses == whole.losses
    train(tmp_path / "moved", 2, PLAN, f"--bf16 --zero-stage 2 --exit-interval {SWITCH + 1} --data-path", corpus)
    moved = train(tmp_path / "moved", 2, PLAN, "--bf16 --zero-stage 3 --data-path", corpus)
    assert moved.losses == pytest.approx(whole.losses, rel=2e-3)


def _killed(argv: list[str], step: int, inside_the_switch: bool) -> int:
    """Runs a rank that kills itself: after a step that is not saved, or in the switch, after the checkpoint at the stage's end."""
    from megatron_patch.training.pretrain import main
    from megatron_patch.training.trainer import Trainer

    name = "_switch" if inside_the_switch else "_account"
    method = getattr(Trainer, name)

    def killing(self, *args, **kwargs):
        method(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Trainer, name, killing)
    return main(argv)


@pytest.mark.parametrize(
    ("step", "inside_the_switch", "resumes_from", "then_ranks"),
    [(SWITCH - 1, False, SWITCH - 3, 3), (SWITCH, False, SWITCH - 3, 1), (SWITCH, True, SWITCH, 3), (SWITCH + 1, False, SWITCH, 1)],
)
def test_the_ledger_of_a_killed_run_has_no_span_twice_and_none_missing(
    tmp_path, corpus, unbroken, step, inside_the_switch, resumes_from, then_ranks
):
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, "--zero-stage 1 --data-path", corpus, ["--save", str(folder)])
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(_killed, 2, tmp_path / "killed-logs", argv, step, inside_the_switch)
    assert max(json.loads(line)["step"] for line in (folder / "spans" / "rank-00000.jsonl").read_text().splitlines()) == step
    resumed = train(folder, then_ranks, PLAN, "--zero-stage 1 --data-path", corpus)
    assert f"step-{resumes_from:08d}: stage" in printed(folder)
    assert resumed.losses == pytest.approx(unbroken.losses, rel=1e-5)
    counts = ledger(resumed, corpus)
    assert counts.max() == 1, "a token was read twice within an epoch"
    assert counts.sum() == resumed.values("tokens")[-1], "the plan's number of tokens"
    assert np.array_equal(counts, ledger(unbroken, corpus))
    assert len(resumed.records("switch")) == 1
    first, last = split_ranges(len(counts), "90,10,0")[0]
    assert counts[last:].sum() == 0 and counts[:first].sum() == 0, "held-out data was read"


def test_killed_at_any_moment_and_resumed_is_bit_identical(tmp_path, corpus):
    words = "--zero-stage 1 --save-interval 1 --data-path"
    whole = train(tmp_path / "whole", 1, PLAN, words, corpus)
    folder = tmp_path / "killed"
    argv = command(MODEL, DATA, PLAN, words, corpus, ["--save", str(folder)])
    draw = random.Random(0)
    kills = 0
    for _ in range(12):
        (process,), _results = start_ranks(start_program, 1, tmp_path / "killed-logs", argv)
        seen = len(list(folder.glob("step-*"))) if folder.exists() else 0
        # Killed during training or saving: shortly after one of the next checkpoint folders appears.
        while process.is_alive() and (len(list(folder.glob("step-*"))) if folder.exists() else 0) <= seen + draw.randint(1, 3):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 3, printed(folder)
    resumed = train(folder, 1, PLAN, words, corpus)
    assert resumed.losses == whole.losses
    assert "resumed from" in printed(folder)


def starts(run: Run) -> list[int]:
    """Returns the step from which each start of a run continued."""
    return [record["step"] for record in run.records("start")]


def test_a_run_that_began_from_another_folder_resumes_from_its_own(tmp_path, corpus, unbroken):
    """When a job is requeued, the same command must not start from --load again."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, 2, PLAN, "--zero-stage 1 --exit-interval 4 --data-path", corpus)
    words = f"--zero-stage 1 --load {first} --data-path"
    train(second, 2, PLAN, "--exit-interval 9", words, corpus)
    run = train(second, 2, PLAN, words, corpus)
    assert starts(run) == [4, 9]
    assert [record["loss"] for record in run.records("step")] == unbroken.losses[4:]
    # Back to an earlier checkpoint of its own on purpose: newer ones are ignored, and the next start resumes from the new branch.
    back = f"--zero-stage 1 --load {second / 'step-00000006'} --data-path"
    train(second, 2, PLAN, "--exit-interval 8", back, corpus)
    assert "without --load the run would resume from" in printed(second)
    run = train(second, 2, PLAN, back, corpus)
    assert starts(run)[2:] == [6, 8]
    assert [record["loss"] for record in run.records("step")] == unbroken.losses[4:]


def test_paths_are_compared_as_paths(tmp_path, corpus, unbroken):
    """A trailing slash, a link or a checkpoint inside of --save must not make a new run resume the old one."""
    words = command("--zero-stage 1 --finetune --data-path", corpus)
    link = tmp_path / "link"
    link.symlink_to(unbroken.folder)
    for load in (f"{unbroken.folder}/", str(link), str(unbroken.folder / "step-00000006")):
        argv = command(MODEL, DATA, PLAN, words, ["--load", load, "--save", str(unbroken.folder)])
        assert run_ranks(start_program, 1, tmp_path / "logs", argv) == [2]
        assert "the folder of one run" in (tmp_path / "logs" / "rank-0.log").read_text()
    # The run in --save began from nothing, and --finetune asks for one that begins from --load.
    train(tmp_path / "other", 1, PLAN, "--zero-stage 1 --exit-interval 2 --data-path", corpus)
    (tmp_path / "file").touch()
    plain = command("--zero-stage 1 --data-path", corpus)
    for more, load in (
        (words, unbroken.folder),
        (plain, unbroken.folder),
        (plain, tmp_path / "typo"),
        (plain, tmp_path / "other" / "step-9"),
    ):
        train(tmp_path / "other", 1, PLAN, more, "--load", [f"{load}/"], expect=4)
        assert "holds a run that began from initial weights" in printed(tmp_path / "other")
    train(tmp_path / "new", 1, PLAN, plain, "--load", [str(tmp_path / "file")], expect=4)
    assert "is not a folder" in printed(tmp_path / "new")
    # The same --load in other words is the same.
    train(tmp_path / "new", 1, PLAN, words, "--exit-interval 2 --load", [str(link)])
    assert starts(train(tmp_path / "new", 1, PLAN, words, "--exit-interval 4 --load", [f"{unbroken.folder}/."])) == [0, 2]


def test_a_folder_to_load_from_that_is_empty_begins_once(tmp_path, corpus, unbroken):
    words = f"--zero-stage 1 --load {tmp_path / 'nothing'} --data-path"
    train(tmp_path / "run", 2, PLAN, "--exit-interval 4", words, corpus)
    run = train(tmp_path / "run", 2, PLAN, words, corpus)
    assert starts(run) == [0, 4] and run.losses == unbroken.losses


def test_a_finished_run_reports_it_and_changes_nothing(unbroken, corpus):
    before = (unbroken.folder / "latest").read_text()
    again = train(unbroken.folder, 2, PLAN, "--zero-stage 1 --data-path", corpus)
    assert "nothing left to do" in printed(unbroken.folder)
    assert len(again.losses) == len(unbroken.losses) and (unbroken.folder / "latest").read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "--hidden-size 48 --patch-size 2 --eod-token-id 63 --eod-mask-loss",
            ["--hidden-size 48 (checkpoint: 32)", "--patch-size 2 (checkpoint: 3)", "--eod-mask-loss True (checkpoint"],
        ),
        (
            "--train-tokens 9000",
            ["cannot be extended at 4,224 of 4,224 tokens: its cosine schedule", "--start-tokens 4224 --block-tokens 48"],
        ),
        ("--seed 8 --max-position-embeddings 64", ["--seed 8 (checkpoint: 7)", "--max-position-embeddings 64 (checkpoint: not given)"]),
        ("--split 80,20,0", ["--split 80,20,0 (checkpoint: 90,10,0)"]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(unbroken, tmp_path, corpus, change, words):
    folder = tmp_path / "new"
    train(folder, 1, PLAN, f"--zero-stage 1 --load {unbroken.folder} {change} --data-path", corpus, expect=4)
    assert all(part in printed(folder) for part in words), printed(folder)


def test_a_batch_in_tokens_keeps_its_size_on_other_ranks(tmp_path, corpus):
    plan = command(
        "--seq-length 16 --micro-batch-size 2 --global-batch-tokens 200 --patch-size 3 --train-tokens 4200 --lr 3e-3",
        "--lr-warmup-fraction 0.1",
    )
    whole = train(tmp_path / "whole", 2, plan, "--data-path", corpus)
    train(tmp_path / "moved", 2, plan, "--exit-interval 4 --data-path", corpus)
    moved = train(tmp_path / "moved", 3, plan, "--data-path", corpus)
    assert moved.losses == pytest.approx(whole.losses, rel=1e-5)
    assert moved.values("lr") == whole.values("lr"), "a warm-up given as a share was rounded once"
    assert "--global-batch-tokens" not in printed(tmp_path / "moved"), "a note on a batch that is not used"


def test_a_finished_run_is_extended_and_changes_are_printed(tmp_path, corpus):
    plan = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 3e-3 --lr-decay-style constant --log-token-spans")
    folder = tmp_path / "run"
    train(folder, 2, plan, "--train-tokens 2000 --data-path", corpus)
    run = train(folder, 1, plan, "--train-tokens 4000 --weight-decay 0.2 --zero-stage 0 --data-path", corpus)
    assert run.values("tokens")[-1] == 21 * 192
    assert ledger(run, corpus).max() == 1, "a token was read twice"
    said = printed(folder)
    for change in ("--train-tokens 2000, now 4000", "--weight-decay 0.1, now 0.2", "stage token: steps 10, now 21"):
        assert f"changed since the checkpoint: {change}" in said
    again = train(folder, 1, plan, "--train-tokens 4000 --weight-decay 0.2 --data-path", corpus)
    assert "nothing left to do" in printed(folder) and "changed since" not in printed(folder)
    assert len(again.records("evaluation")) == 2, "one at each end"
