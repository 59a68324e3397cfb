"""The plan of a resumed run: the same on every layout, and extended only where the past does not depend on the old end."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.parsing import ParsedOptions, parse
from megatron_patch.config.plan_builder import build_plan
from megatron_patch.config.resolve import resolve
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.stages import Progress, StagePlan
from megatron_patch.training.lr_schedule import build_lr_schedule
from megatron_patch.training.resumed_plan import resume_plan, tokens_to_continue_at
from tests.data.streams import corpus_of
from tests.distributed.runs import command

BASE = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 --dry-run"


@functools.cache
def _parsed(words):
    return parse(words)


def read(*words, ranks=1, **stages):
    """Returns the run of a command line; options for stages may be given as keywords, which is quicker than words."""
    parsed = _parsed(tuple(command(BASE, *words)))
    options = dataclasses.replace(parsed.options, stages=dataclasses.replace(parsed.options.stages, **stages))
    return resolve(ParsedOptions(options, parsed.origins), ranks)


def resume(then, run, progress, changed, plan=None):
    """Returns how `run` resumes a run with the options of `then`, from its own plan or from `plan`."""
    saved = plan or then.plan
    then, run = (dataclasses.replace(one, plan=one.plan_with_batch_of(saved)) for one in (then, run))
    return resume_plan(saved, then, run, progress, changed)


def names(changed):
    """Returns changed options whose values do not matter here."""
    return dict.fromkeys(changed, (None, None))


def step_ends(plan):
    ends, tokens = [], 0
    for stage in plan.stages:
        ends += list(range(tokens + stage.tokens_per_step, tokens + stage.tokens + 1, stage.tokens_per_step))
        tokens += stage.tokens
    return ends


@given(
    st.sampled_from(
        ["--recipe patch-train --patch-size 4", "--recipe token-superposition --patch-size 3", "--patch-size 3 --patch-fraction 0.4"]
    ),
    st.sampled_from(
        [
            "--lr-warmup-fraction 0.1",
            "--lr-warmup-fraction 0.07 --lr-decay-style WSD --lr-wsd-decay-fraction 0.3",
            "--lr-warmup-steps 3 --lr-decay-style WSD --lr-decay-steps 8 --lr-wsd-decay-steps 4",
            "",
        ]
    ),
    st.sampled_from(["--global-batch-tokens 200", "--global-batch-tokens 1000", "--global-batch-size 12"]),
    st.tuples(st.integers(1, 7), st.integers(1, 4)),
    st.tuples(st.integers(1, 7), st.integers(1, 4)),
)
def test_every_layout_resumes_the_plan_of_the_first_start(stages, schedule, batch, before, then):
    """A plan rounded to one number of ranks and micro-batch stays, whatever the next start would have rounded it to."""
    (ranks, micro), (then_ranks, then_micro) = before, then
    words = f"{stages} {schedule} {batch} --train-tokens 30000"
    first = read(words, ranks=ranks, micro_batch_size=micro)
    saved = first.plan
    run = read(words, ranks=then_ranks, micro_batch_size=then_micro)
    resumed = resume(first, run, Progress(0, 1), {}).plan
    assert [stage.micro_batch_size for stage in resumed.stages] == [then_micro] * len(saved.stages)
    for old, new in zip(saved.stages, resumed.stages, strict=True):
        assert dataclasses.replace(new, micro_batch_size=old.micro_batch_size) == old
    assert [build_lr_schedule(resumed).at(end) for end in step_ends(saved)] == [
        build_lr_schedule(saved).at(end) for end in step_ends(saved)
    ]


def extend(words, more, progress, ranks=1, changed=("train_tokens",)):
    then = read(words, "--train-tokens 30720 --global-batch-size 12")
    run = read(words, "--global-batch-size 12", more, ranks=ranks)
    return then.plan, resume(then, run, progress(then.plan) if callable(progress) else progress, names(changed))


def finished(plan):
    return Progress(len(plan.stages) - 1, plan.stages[-1].steps)


ALLOWED = {
    "constant, finished": ("--lr-decay-style constant --lr-warmup-fraction 0.1", finished),
    "constant, in the patch stage": ("--lr-decay-style constant --lr-warmup-fraction 0.1 --patch-size 4", Progress(0, 9)),
    "constant, in the token stage": ("--lr-decay-style constant --patch-size 4", Progress(1, 9)),
    "inverse square root": ("--lr-decay-style inverse-square-root --lr-warmup-fraction 0.1", finished),
    "WSD before its decay": ("--lr-decay-style WSD --lr-wsd-decay-fraction 0.25 --lr-warmup-fraction 0.1", Progress(0, 120)),
    "WSD in steps": ("--lr-decay-style WSD --lr-wsd-decay-steps 40 --lr-warmup-steps 10", Progress(0, 120)),
    "WSD in steps over both stages": (
        "--recipe token-superposition --patch-size 4 --lr-warmup-steps 28 --lr-wsd-decay-steps 50",
        Progress(0, 12),
    ),
    "WSD over both stages": ("--recipe token-superposition --patch-size 4 --lr-wsd-decay-fraction 0.1", Progress(1, 3)),
    "a cosine with its own end": ("--lr-decay-tokens 20000", finished),
    "a token stage that has not begun": ("--patch-size 4", lambda plan: Progress(0, plan.stages[0].steps)),
}
REFUSED = {
    "a cosine": ("", Progress(0, 1), "cosine"),
    "a cosine at its end": ("", finished, "cosine"),
    "linear": ("--lr-decay-style linear", Progress(0, 50), "linear"),
    "WSD in its decay": ("--lr-decay-style WSD --lr-wsd-decay-fraction 0.25", Progress(0, 121), "WSD"),
    "a patch stage with a cosine": ("--patch-size 4", Progress(0, 5), "cosine"),
    "labels that are annealed": ("--patch-size 4 --lr-decay-style constant --anneal-share 0.5", Progress(0, 90), "label weights"),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_more_tokens_extend_a_plan_whose_past_does_not_change(case):
    words, progress = ALLOWED[case]
    saved, result = extend(words, "--train-tokens 61440", progress, ranks=3)
    assert result.differences == ()
    plan = result.plan
    place = progress(saved) if callable(progress) else progress
    assert plan.tokens == pytest.approx(61440, rel=0.02)
    assert plan.consumed_tokens(place) == saved.consumed_tokens(place)
    assert plan.stages[: place.stage_index] == saved.stages[: place.stage_index], "ended stages stay"
    done = [end for end in step_ends(saved) if end <= saved.consumed_tokens(place)]
    old, new = build_lr_schedule(saved), build_lr_schedule(plan)
    assert [new.at(end) for end in done] == [old.at(end) for end in done], "the past"
    begun = plan.stages[0].lr
    assert begun.warmup_tokens == saved.stages[0].lr.warmup_tokens and begun.wsd_decay_tokens == saved.stages[0].lr.wsd_decay_tokens
    if plan.stages[0].lr.style == "WSD":
        assert new.at(plan.tokens) == 0.0 and new.at(plan.tokens - begun.wsd_decay_tokens) == begun.lr, "the decay moves to the new end"


@pytest.mark.parametrize("case", REFUSED)
def test_more_tokens_are_refused_where_the_past_depends_on_the_end(case):
    words, progress, reason = REFUSED[case]
    (difference,) = extend(words, "--train-tokens 61440", progress)[1].differences
    assert "cannot be extended" in difference and reason in difference


def test_an_unstarted_stage_gets_its_lengths_from_the_extended_plan():
    """Patches are done; the token stage takes all further tokens, and its warm-up is a tenth of them."""
    saved, result = extend(
        "--patch-size 4 --lr-warmup-fraction 0.1", "--train-tokens 61440", lambda plan: Progress(0, plan.stages[0].steps)
    )
    plan = result.plan
    assert plan.stages[0] == saved.stages[0]
    assert plan.stages[1].tokens == pytest.approx(61440 - saved.stages[0].tokens, abs=plan.stages[1].tokens_per_step)
    assert plan.stages[1].lr.warmup_tokens == round(plan.stages[1].tokens * 0.1)


LIST = [{"patch_size": 4, "tokens": 15360}, {"patch_size": 1, "tokens": 15360}]


def listed(*more):
    return ["--global-batch-size", "12", "--stages", json.dumps([*LIST, *more])]


def test_a_new_last_stage_continues_a_finished_run():
    then = read(listed())
    new = {"patch_size": 2, "tokens": 7680, "lr": 1e-4, "lr_warmup_tokens": 768}
    # Another flag that changes without an effect does not hide the new stage.
    result = resume(then, read(listed(new), "--batch constant-tokens"), finished(then.plan), names(["stages", "batch"]))
    assert result.plan.stages[:2] == then.plan.stages and len(result.plan.stages) == 3
    assert result.changes == ("new stage patch-2, 40 steps",)
    schedule = build_lr_schedule(result.plan)
    assert schedule.at(30720) == 0.0 and schedule.at(30720 + 768) == 1e-4
    continues = {"patch_size": 1, "tokens": 7680, "lr_policy": "continue", "name": "more"}
    (difference,) = resume(then, read(listed(continues)), finished(then.plan), names(["stages"])).differences
    assert "cosine" in difference


def test_lengths_in_the_list_may_change():
    """A warm-up given in tokens in a stage changes on purpose; one that --lr-warmup-fraction gave keeps its tokens."""
    before = [{**LIST[0], "lr_warmup_tokens": 384}, LIST[1]]
    after = [{**LIST[0], "lr_warmup_tokens": 768}, LIST[1], {"patch_size": 1, "tokens": 7680}]
    then, run = (read("--global-batch-size 12 --lr-warmup-fraction 0.1 --stages", [json.dumps(stages)]) for stages in (before, after))
    result = resume(then, run, Progress(0, 5), {"stages": (json.dumps(before), json.dumps(after))})
    assert [stage.lr.warmup_tokens for stage in result.plan.stages] == [768, 1536, 768]
    assert result.changes == ("stage 1-patch-4: lr: warmup_tokens 384, now 768", "new stage 3-token, 40 steps")


def test_a_length_in_another_unit_changes_only_if_it_is_another_length():
    """30 patch steps of 768 tokens; the same in tokens is no change, and other steps are counted in the plan that runs."""
    words = "--recipe token-superposition --patch-size 4 --train-tokens 61440 --global-batch-size 12"
    then, same, more = (read(words, unit) for unit in ("--lr-warmup-steps 30", "--lr-warmup-tokens 23040", "--lr-warmup-steps 60"))
    assert then.plan.stages[0].lr.warmup_tokens == 23040 and then.plan.stages[0].steps == 51
    changed = names(["lr_warmup_steps", "lr_warmup_tokens"])
    result = resume(then, same, Progress(0, 5), changed)
    assert result.plan.stages[0] == then.plan.stages[0] and result.changes == ()
    result = resume(then, more, Progress(0, 5), names(["lr_warmup_steps"]))
    assert result.changes == (f"stage patch: lr: warmup_tokens 23,040, now {51 * 768 + 9 * 192:,}",)


def test_steps_in_the_list_may_change():
    stages = [{**LIST[0], "lr_warmup_steps": 3, "lr_decay_steps": 15}, {**LIST[1], "lr_warmup_steps": 4}]
    after = [{**stages[0], "lr_decay_steps": 18}, {**stages[1], "lr_warmup_steps": 5}]
    then, run = (read("--global-batch-size 12 --stages", [json.dumps(entries)]) for entries in (stages, after))
    result = resume(then, run, Progress(0, 5), {"stages": (json.dumps(stages), json.dumps(after))})
    assert result.changes == (
        "stage patch-4: lr: decay_tokens 2,880, now 3,456",
        "stage token: lr: warmup_tokens 768, now 960",
    )


SHORT = [{"patch_size": 4, "steps": 5, "name": "a"}, {"patch_size": 1, "steps": 5, "name": "t"}]
NEW = {"patch_size": 2, "steps": 4, "name": "n"}


@pytest.mark.parametrize(
    ("stages", "progress", "steps", "differences"),
    [
        ([*SHORT, NEW], Progress(1, 5), [5, 5, 4], ()),
        ([SHORT[0], {**SHORT[1], "steps": 8}, NEW], Progress(1, 5), [5, 8, 4], ()),
        ([SHORT[0], {**SHORT[1], "steps": 8}], Progress(1, 2), [5, 8], ()),
        ([SHORT[0], {**SHORT[1], "steps": 3}, NEW], Progress(1, 5), None, ("stage t: steps 3 (checkpoint: 5)",)),
        ([{**SHORT[0], "steps": 7}, SHORT[1]], Progress(1, 1), None, ("stage a: steps 7 (checkpoint: 5)",)),
        ([SHORT[0], {**SHORT[1], "steps": 4}, NEW], Progress(1, 2), None, ("stage t: steps 4 (checkpoint: 5)",)),
        ([SHORT[0], {"patch_size": 1, "steps": 3, "name": "mid"}, SHORT[1]], Progress(1, 5), None, ("stage t: steps 3 (checkpoint: 5)",)),
    ],
)
def test_stages_with_their_own_steps_get_these(stages, progress, steps, differences):
    words = ["--lr-decay-style", "constant", "--global-batch-size", "12", "--stages"]
    then, run = (read(words, [json.dumps(entries)]) for entries in (SHORT, stages))
    result = resume(then, run, progress, names(["stages"]))
    assert result.differences == differences
    assert steps is None or [stage.steps for stage in result.plan.stages] == steps


def test_learning_rates_may_change_after_an_extension():
    words = "--patch-size 4 --lr-decay-style constant --global-batch-size 12 --train-tokens"
    first, longer, lower = read(words, "1920"), read(words, "3840"), read(words, "3840 --lr 1e-4")
    place = Progress(1, first.plan.stages[1].steps)
    extended = resume(first, longer, place, names(["train_tokens"])).plan
    result = resume(longer, lower, place, names(["lr"]), extended)
    assert result.differences == () and [stage.steps for stage in result.plan.stages] == [stage.steps for stage in extended.stages]
    assert [stage.lr.lr for stage in result.plan.stages] == [1e-4, 1e-4]
    longest = resume(longer, read(words, "4032"), place, names(["train_tokens"]), extended)
    assert longest.differences == () and longest.plan.tokens == 4032


def test_another_list_is_refused_by_its_stages():
    then = read(listed())
    for change, words in (
        ({"tokens": 7680}, "stage patch-4: steps 40 (checkpoint: 80)"),
        ({"patch_size": 2}, "patch_size 2 (checkpoint: 4)"),
    ):
        described = read(["--global-batch-size", "12", "--stages", json.dumps([{**LIST[0], **change}, {**LIST[1], "tokens": 61440}])])
        differences = resume(then, described, Progress(1, 3), names(["stages"])).differences
        assert any(words in difference for difference in differences), differences


def test_fewer_tokens_and_another_share_are_refused():
    then = read("--patch-size 4 --lr-decay-style constant --train-tokens 30720 --global-batch-size 12")
    for more, changed in (
        ("--train-tokens 15360", ["train_tokens"]),
        ("--train-tokens 61440 --patch-fraction 0.5", ["train_tokens", "patch_fraction"]),
    ):
        run = read("--patch-size 4 --lr-decay-style constant --global-batch-size 12", more)
        assert resume(then, run, Progress(0, 5), names(changed)).differences


@pytest.mark.parametrize(
    ("before", "after", "tokens", "place"),
    [
        ([{"patch_size": 1, "name": "b"}], [{"patch_size": 1, "name": "b"}, {"patch_size": 1, "steps": 6}], "1920 1920", Progress(0, 10)),
        ([{"patch_size": 4, "name": "a"}, {"patch_size": 1, "steps": 5}], None, "3840 7680", Progress(1, 2)),
    ],
)
def test_tokens_that_no_stage_can_take_are_refused(before, after, tokens, place):
    """Otherwise the next start would find a plan that does not follow from its options."""
    words = "--lr-decay-style constant --global-batch-size 12 --train-tokens"
    first, second = tokens.split()
    then, run = (read(words, total, "--stages", [json.dumps(entries)]) for total, entries in ((first, before), (second, after or before)))
    (difference,) = resume(then, run, place, names(["stages", "train_tokens"])).differences
    assert "no stage takes the difference" in difference


@pytest.mark.parametrize(
    ("words", "more", "place"),
    [
        ("", "--lr-decay-style cosine", finished),
        ("", "--lr-wsd-decay-fraction 0.2", Progress(0, 50)),
        ("--lr-decay-style WSD --lr-wsd-decay-fraction 0.5", "--lr-wsd-decay-fraction None --lr-wsd-decay-tokens 15360", Progress(0, 120)),
    ],
)
def test_words_without_an_effect_do_not_let_a_schedule_grow(words, more, place):
    then = read(words, "--global-batch-size 12 --train-tokens 30720")
    run = read(words, "--global-batch-size 12 --train-tokens 61440", more)
    changed = names(["train_tokens", *(word[2:].replace("-", "_") for word in more.split() if word.startswith("--"))])
    (difference,) = resume(then, run, place(then.plan) if callable(place) else place, changed).differences
    assert "depends on its end" in difference


def test_a_later_switch_must_not_move_the_schedule_that_runs():
    for old, new in (("restart", "continue"), ("continue", "restart")):
        then, run = (
            read("--global-batch-size 12 --stages", [json.dumps([LIST[0], {**LIST[1], "lr_policy": policy}])]) for policy in (old, new)
        )
        (difference,) = resume(then, run, Progress(0, 8), names(["stages"])).differences
        assert "depends on its end" in difference


def test_stages_read_the_corpora_that_they_began_with():
    """A corpus is known by its number in the order of the names, so that all files may move together."""

    def run_of(main, *stages):
        entries = [{"patch_size": 1, "steps": 6, "name": f"s{number}", "data_path": path} for number, path in enumerate(stages)]
        return read("--lr-decay-style constant --global-batch-size 12 --data-path", [main, "--stages", json.dumps(entries)])

    then = run_of("C", "D", "C")
    moved = resume(then, run_of("x/C", "x/D", "x/C"), Progress(0, 3), names(["stages"]))
    assert moved.differences == () and [stage.blend for stage in moved.plan.stages] == [(("x/D", 1.0),), (("x/C", 1.0),)]
    for other in (("C", "C", "D"), ("C", "D", "E"), ("x/C", "D", "C"), ("C", "C", "C"), ("C", "1 C 3 D", "C")):
        assert resume(then, run_of(*other), Progress(0, 3), names(["stages"])).differences


def test_larger_patches_than_the_reserved_tokens_cannot_follow():
    then = read(listed())
    run = read(listed({"patch_size": 128, "tokens": 15360, "batch": "constant-positions"}), "--block-tokens 2048")
    assert resume(then, run, finished(then.plan), names(["stages", "block_tokens"])).differences


def test_nothing_follows_a_stage_that_ends_inside_a_block():
    words = ["--lr-decay-style", "constant", "--global-batch-size", "3", "--block-tokens", "64", "--stages"]
    last = [{"patch_size": 1, "steps": 5, "name": "b"}]
    then, run = (read(words, [json.dumps(entries)]) for entries in (last, [*last, {**NEW, "patch_size": 1}]))
    (difference,) = resume(then, run, finished(then.plan), names(["stages"])).differences
    assert difference == "stage b ends inside a block of 64 tokens, so no stage can follow it"


def test_a_switch_that_is_past_cannot_change():
    after = [LIST[0], {**LIST[1], "optimizer": "keep"}]
    then, run = read(listed()), read(["--global-batch-size", "12", "--stages", json.dumps(after)])
    assert resume(then, run, Progress(0, 5), names(["stages"])).changes == ("stage token: optimizer reset, now keep",)
    assert resume(then, run, Progress(1, 5), names(["stages"])).differences == ("stage token: optimizer keep (checkpoint: reset)",)


def test_a_changed_learning_rate_keeps_the_lengths_of_the_first_start():
    words = "--patch-size 4 --train-tokens 30000 --global-batch-tokens 1000 --lr-warmup-fraction 0.1 --micro-batch-size"
    then = read(words, "4")
    result = resume(then, read(words, "1 --lr 1e-4", ranks=5), Progress(0, 5), names(["lr"]))
    for old, new in zip(then.plan.stages, result.plan.stages, strict=True):
        assert new.lr == dataclasses.replace(old.lr, lr=1e-4) and new.steps == old.steps
    assert result.changes == tuple(f"stage {name}: lr: lr 0.0003, now 0.0001" for name in ("patch", "token"))


@given(st.integers(1, 30), st.integers(1, 60), st.integers(0, 60), st.integers(1, 7), st.sampled_from([4, 16]))
def test_a_new_run_after_the_given_tokens_reads_none_again(corpus, batch, steps, done, window, block):
    """The advice for a run that cannot be extended: no token of its shuffle windows is read twice."""
    stages = json.dumps([{"patch_size": 1, "steps": steps}])
    plan = read("--seq-length 4", global_batch_size=batch, stages=stages, block_tokens=block).plan
    done = min(done, steps)
    start = tokens_to_continue_at(plan, Progress(0, done), window)

    def starts(skip, samples):
        stream = TrainStream(plan, {"c": corpus}, [("c", 1.0)], "1,0,0", 3, window, skip_blocks=skip // block)
        return {*stream.locate(0, np.arange(samples, dtype=np.int64))[1].tolist()}

    assert start % block == 0 and start >= done * plan.stages[0].tokens_per_step
    assert not starts(0, done * batch) & starts(start, plan.stages[0].samples)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("corpus"), 40_000)


@given(
    steps=st.integers(1, 60),
    more=st.integers(2, 60),
    window=st.integers(1, 5),
    batch=st.integers(1, 9).map(lambda half: 2 * half),
    patch_size=st.sampled_from([1, 2]),
)
def test_an_extended_run_reads_no_token_twice_and_leaves_none_out(corpus, steps, more, window, batch, patch_size):
    """A run that is extended twice, when it is finished and while it runs, reads every token of its blocks exactly once."""

    def run_of(steps):
        stages = json.dumps([{"patch_size": patch_size, "steps": steps}])
        return read("--seq-length 4 --lr-decay-style constant", global_batch_size=batch, stages=stages)

    runs = [run_of(steps + extra) for extra in (0, more, 2 * more)]
    plans = [runs[0].plan]
    places = [steps, steps + more // 2, steps + 2 * more]
    for place, then, longer in zip(places, runs, runs[1:], strict=False):
        plan = resume(then, longer, Progress(0, place), names(["stages"]), plans[-1]).plan
        plans.append(StagePlan.from_json(json.loads(json.dumps(plan.to_json()))))
    size, read_tokens = plans[0].stages[0].global_batch_size, []
    for plan, first, last in zip(plans, [0, *places], places, strict=False):
        stream = TrainStream(plan, {"c": corpus}, [("c", 1.0)], "1,0,0", 3, window)
        read_tokens += stream.locate(0, np.arange(first * size, last * size, dtype=np.int64))[1].tolist()
    assert len(read_tokens) == places[-1] * size == len({*read_tokens})
    blocks = plans[-1].last_block(0) * plans[-1].block_tokens
    whole = stream.locate(0, np.arange(blocks // (4 * patch_size), dtype=np.int64))[1]
    assert {*read_tokens} <= {*whole.tolist()} and len({*whole.tolist()}) == len(whole)


def test_a_plan_describes_itself_with_its_own_batch():
    """What `resume_plan` compares: the options with the batch of the first start, for which the ranks do not matter."""
    run = read("--patch-size 3 --train-tokens 30000 --global-batch-tokens 1000 --micro-batch-size 4", ranks=7)
    again = read("--patch-size 3 --train-tokens 30000 --global-batch-tokens 1000 --micro-batch-size 1")
    assert again.plan_with_batch_of(run.plan).stages[0].steps == run.plan.stages[0].steps
    assert again.plan.stages[0].global_batch_size != run.plan.stages[0].global_batch_size
    assert build_plan(run.options.stages, run.options.schedule, 7) == run.plan
