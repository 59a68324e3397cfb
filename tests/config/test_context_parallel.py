"""Context-parallel sizes: from flags and `stages:` into the plan, and what is refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_patch.api.own_parts import with_model
from megatron_patch.config.resolve import load_config
from megatron_patch.engine.deepspeed_config import batch_settings
from megatron_patch.errors import ConfigError

RUN = "--num-layers 2 --hidden-size 48 --num-attention-heads 12 --vocab-size 64 --seq-length 16 --train-tokens 10k --dry-run"
RUN += " --micro-batch-size 2 --global-batch-size 24"
LIST = [{"patch_size": 4, "token_share": 0.5}, {"context_parallel_size": 4}]


def resolve(words, ranks, stages=None):
    listed = [] if stages is None else ["--stages", json.dumps(stages)]
    return load_config([*RUN.split(), *words.split(), *listed], ranks)


def sizes(run):
    return [stage.context_parallel_size for stage in run.plan.stages]


def test_a_stage_without_its_own_size_takes_that_of_the_flag_or_its_share():
    assert sizes(resolve("", 4)) == [1]
    assert sizes(resolve("--patch-size 4 --context-parallel-size 2", 4)) == [2, 2]
    assert sizes(resolve("--patch-size 4 --context-parallel-size 4 --sample constant-tokens", 4)) == [1, 4]
    assert sizes(resolve("--patch-size 2 --context-parallel-size 4 --sample constant-tokens", 4)) == [2, 4]
    assert sizes(resolve("", 4, LIST)) == [1, 4]
    assert sizes(resolve("--context-parallel-size 2", 4, LIST)) == [2, 4]


def test_ranks_that_share_samples_read_a_micro_batch_together():
    """Ranks divide by the size in accumulation; for DeepSpeed, every rank has a micro-batch of its own."""
    patch, token = resolve("", 4, LIST).plan.stages
    # 24 samples of 64 tokens become 6 samples of 4 x 64 tokens.
    assert batch_settings(patch, 4) == {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 8}
    assert batch_settings(token, 4) == {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 12, "train_batch_size": 96}
    assert token.sample_ranks(4) == 1 and replace(token, context_parallel_size=2).sample_ranks(4) == 2


def test_a_batch_in_tokens_is_rounded_for_the_ranks_that_read_different_samples():
    words = "--global-batch-size None --global-batch-tokens"
    assert resolve(f"{words} 70", 4).plan.stages[0].global_batch_size == 8
    assert resolve(f"{words} 70 --context-parallel-size 2", 4).plan.stages[0].global_batch_size == 4


def test_steps_that_are_padded_are_noted_for_the_ranks_that_read_different_samples():
    notes = resolve("--context-parallel-size 2 --global-batch-size 10", 8).notes
    assert any("micro-batches of 2 on 4 groups of 2 context-parallel ranks" in note for note in notes)


HEADS = "--cp-comm-type a2a"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.mark.parametrize(
    ("words", "ranks", "reason", "allowed"),
    [
        ("--context-parallel-size 4", 6, "it does not fit 6 data-parallel ranks", "1, 2"),
        (f"{HEADS} --context-parallel-size 8", 8, "it does not fit 12 query heads", "1, 2, 4"),
        (f"{HEADS} {TENSOR} --context-parallel-size 4", 8, "it does not fit 6 query heads of a tensor-parallel rank", "1, 2"),
        (f"{HEADS} --context-parallel-size 2 --num-query-groups 3", 2, "it does not fit 3 key-value heads", "1"),
        ("--context-parallel-size 4 --seq-length 18", 4, "it does not fit samples of 18 positions", "1, 2"),
        (f"{TENSOR} --context-parallel-size 2 --seq-length 18", 4, "18 positions in 2 parts of --sequence-parallel", "1"),
        ("--context-parallel-size 4 --patch-size 3 --seq-length 18 --sample constant-tokens", 4, "in stage 'token': it does not", "1, 2"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(words, ranks, reason, allowed):
    with pytest.raises(ConfigError) as refused:
        resolve(words, ranks)
    assert reason in refused.value.what and refused.value.do
    assert refused.value.allowed.split(": ")[1].rstrip() == allowed


def test_all_that_does_not_fit_is_named_at_once():
    stages = [{"patch_size": 2, "steps": 2, "context_parallel_size": 5}, {"context_parallel_size": 32}]
    with pytest.raises(ConfigError) as refused:
        resolve(f"{HEADS} --num-query-groups 6", 8, stages)
    said = str(refused.value)
    for part in ("2 problems", "'patch-2'", "'token'", "8 data-parallel ranks", "12 query heads", "6 key-value heads", "16 positions"):
        assert part in said


def test_a_size_fits_with_fewer_key_value_heads_than_ranks():
    assert sizes(resolve("--context-parallel-size 4 --num-query-groups 2", 4)) == [4]
    assert sizes(resolve("--context-parallel-size 3 --num-query-groups 1 --seq-length 18", 3)) == [3]


@pytest.mark.parametrize("words", ["--context-parallel-size 8", "--context-parallel-size 2 --num-query-groups 3"])
def test_ranks_that_cannot_share_the_heads_gather_keys_and_values(words):
    run = resolve(words, 8)
    size = run.plan.stages[0].context_parallel_size
    assert run.gathering_sizes == {size}
    assert any("gather keys and values of all positions" in note and f"{size} context-parallel ranks" in note for note in run.notes)
    sharing = resolve("--context-parallel-size 4", 8)
    assert not sharing.gathering_sizes and not any("gather" in note for note in sharing.notes)
    asked = resolve("--context-parallel-size 4 --cp-comm-type all_gather", 8)
    assert asked.gathering_sizes == {4} and not any("gather" in note for note in asked.notes)


def test_entries_of_stages_have_whole_numbers_from_1():
    for value in (0, -1, "two"):
        with pytest.raises(ConfigError, match="context_parallel_size"):
            resolve("", 4, [{"context_parallel_size": value}])
    with pytest.raises(ConfigError, match="--context-parallel-size 0"):
        resolve("--context-parallel-size 0", 4)


def test_a_model_of_ones_own_has_all_positions_unless_it_declares_that_it_shares_heads():
    def plain(shape, parallel):
        raise AssertionError

    with pytest.raises(ConfigError, match="model=plain with --context-parallel-size 2 in stage 'token'"):
        with_model(resolve("--context-parallel-size 2", 2), plain)
    assert with_model(resolve("", 2), plain).own_model.name == "plain"
    plain.context_parallel = True
    assert with_model(resolve("--context-parallel-size 2", 2), plain).own_model.name == "plain"
