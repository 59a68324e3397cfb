"""Plan, stream, collator and switch as a loop of one's own uses them."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from megatron_patch.data.collate import make_batch
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.library import (
    DocumentMasking,
    PatchCollator,
    Stage,
    StagePlan,
    TokenStream,
    build_plan,
    learning_rate,
    multi_token_loss,
    switch_optimizer,
)
from tests.distributed.runs import EOD, make_corpus

TOKENS = torch.arange(5000)  # each token is its own place


def plan(**more):
    return build_plan(
        **{"patch_size": 4, "train_tokens": 3072, "seq_length": 8, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1.0} | more
    )


def listed(*stages, **more):
    return plan(patch_size=None, train_tokens=None, stages=stages, **more)


def places(batches):
    """How often each token of `TOKENS` was an input."""
    counts = np.zeros(len(TOKENS), dtype=int)
    for batch in batches:
        np.add.at(counts, batch["input_ids"].numpy().ravel(), 1)
    return counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_token_is_read_once_over_all_stages_and_ranks(ranks):
    streams = [TokenStream(plan(world_size=ranks, micro_batch_size=1), TOKENS, rank=rank, world_size=ranks) for rank in range(ranks)]
    counts = places(batch for stream in streams for batch in stream)
    assert counts.max() == 1 and counts.sum() == 3072


def test_labels_are_the_tokens_after_each_patch():
    for batch in TokenStream(plan(), TOKENS):
        ids, labels, k = batch["input_ids"], batch["labels"], batch["input_ids"].shape[-1]
        assert torch.equal(labels, ids + k) and torch.equal(batch["label_weights"], torch.ones(k))


@settings(max_examples=20)
@given(st.integers(0, 24), st.integers(1, 7))
def test_two_numbers_resume_it_without_repeating_or_losing_a_token(steps, more):
    """Stopped after any micro-batch; a step that is not complete is read again, since its gradients are lost."""
    whole = plan()
    everything = [batch["input_ids"] for batch in TokenStream(whole, TOKENS)]
    sizes = [stage.gradient_accumulation(1) for stage in whole.stages for _ in range(stage.steps)]
    taken = sum(sizes[:steps]) + min(more, sizes[steps] - 1 if steps < len(sizes) else 0)
    first = TokenStream(whole, TOKENS)
    assert len(list(itertools.islice(iter(first), taken))) == taken
    state = first.state_dict()
    assert sorted(state) == ["stage_index", "stage_step"]
    second = TokenStream(whole, TOKENS)
    second.load_state_dict(state)
    rest = [batch["input_ids"] for batch in second]
    expected = everything[sum(sizes[:steps]) :]
    assert len(rest) == len(expected) and all(map(torch.equal, rest, expected))


def test_it_reads_what_the_program_reads(tmp_path):
    """The same samples in the same order as the program's loader, on each of two ranks, also with documents."""
    prefix = make_corpus(tmp_path / "walks")
    rules = DocumentMasking(eod_id=EOD, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    stages = plan(world_size=2, micro_batch_size=1)
    inner = TrainStream(stages, {"x": TokenCorpus([prefix])}, (("x", 1.0),), "90,10,0", seed=7)
    for rank in range(2):
        found = iter(TokenStream(stages, prefix, seed=7, split="90,10,0", documents=rules, vocab_size=64, rank=rank, world_size=2))
        for index, stage in enumerate(stages.stages):
            loader = PatchLoader(inner, index, rank, 2, rules)
            for batch in itertools.chain.from_iterable(loader.next_step() for _ in range(stage.steps)):
                ours = next(found)
                for name in ("input_ids", "labels", "position_ids"):
                    assert torch.equal(ours[name], getattr(batch, name))
                restarts = batch.position_ids == 0
                assert torch.equal(ours["document_ids"], restarts.flatten().cumsum(0).view_as(restarts) - 1)
            loader.close()
        assert next(found, None) is None


def test_data_may_be_an_array_a_file_or_a_blend(tmp_path):
    prefixes = [make_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    tokens = np.fromfile(f"{prefixes[0]}.bin", dtype=np.uint16)
    from_file, from_array = (list(TokenStream(plan(), data)) for data in (prefixes[0], tokens))
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(from_file, from_array, strict=True))
    blend = TokenStream(plan(), {prefixes[0]: 3.0, prefixes[1]: 1.0})
    assert sum(batch["input_ids"].numel() for batch in blend) == 3072
    notes = TokenStream(plan(train_tokens=6144), TOKENS).notes
    assert notes == ["by the end of stage token the training part of array is read 1.25 times"]


def test_a_loader_of_torch_passes_batches_on():
    direct = list(TokenStream(plan(), TOKENS))
    loaded = list(DataLoader(TokenStream(plan(), TOKENS), batch_size=None))
    assert all(torch.equal(one["labels"], other["labels"]) for one, other in zip(direct, loaded, strict=True))


def test_a_further_iteration_continues_and_an_abandoned_one_leaves_no_thread():
    stream = TokenStream(plan(), TOKENS)
    everything = [batch["input_ids"] for batch in TokenStream(plan(), TOKENS)]
    first = list(itertools.islice(stream, 3))
    rest = [batch["input_ids"] for batch in stream]
    assert len(first) == 3 and len(rest) == len(everything) - 3 and torch.equal(rest[0], everything[3])
    assert list(stream) == []
    stream.seek(0)
    assert torch.equal(next(iter(stream))["input_ids"], everything[0])
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_label_weights_follow_the_plan():
    annealed = listed({"patch_size": 2, "steps": 4, "anneal_share": 0.5}, {"patch_size": 1, "steps": 1})
    weights = [tuple(batch["label_weights"].tolist()) for batch in TokenStream(annealed, TOKENS)]
    assert list(dict.fromkeys(weights)) == [(1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (1.0,)]


def test_the_plan_keeps_the_number_of_micro_batches():
    constant = plan(micro_batch_size=None, gradient_accumulation=2)
    assert [(s.micro_batch_size, s.global_batch_size, s.gradient_accumulation(1)) for s in constant.stages] == [(1, 2, 2), (4, 8, 2)]
    assert len(list(TokenStream(constant, TOKENS, gradient_accumulation=2))) == 2 * constant.steps


def test_rates_are_a_function_of_tokens():
    both = build_plan("token-superposition", patch_size=4, train_tokens=8064, patch_compute_share=0.25, seq_length=16, global_batch_size=12)
    assert len({learning_rate(both, n) for n in range(192, 6000, 192)}) == 1  # stable, over the switch
    restarting = plan(lr=2.0, min_lr=1.0)
    end = restarting.stages[0].tokens
    assert learning_rate(restarting, end) == 1.0 and learning_rate(restarting, end + 1) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("rule", ["reset", "keep", "reset_moments"])
def test_the_switch_of_an_optimizer(rule):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(2):
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    switch_optimizer(optimizer, Stage("token", 1, 8, 1, 1, 1, optimizer=rule))
    state = optimizer.state.get(weight, {})
    moments = sum(float(state[name].abs().sum()) for name in ("exp_avg", "exp_avg_sq") if name in state)
    assert (bool(state), moments > 0, float(state.get("step", 0))) == {
        "reset": (False, False, 0), "keep": (True, True, 2), "reset_moments": (True, False, 2)
    }[rule]  # fmt: skip


def test_the_collator_gives_what_the_stream_gives():
    (stage,) = listed({"patch_size": 2, "steps": 3}, position_weights="power").stages
    rules = DocumentMasking(eod_id=5, eod_mask_loss=True)
    collator = PatchCollator(2, documents=rules, position_weights="power")
    for batch in TokenStream(StagePlan((stage,), 16), TOKENS % 9, documents=rules):
        rows = [[*inputs.flatten().tolist(), *last.tolist()] for inputs, last in zip(batch["input_ids"], last_labels(batch), strict=True)]
        again = collator([{"input_ids": row} for row in rows])
        assert all(torch.equal(again[name], batch[name]) for name in batch) and set(again) == set(batch)


def last_labels(batch):
    """The last K tokens, which labels of other documents hide."""
    return (batch["input_ids"][:, -1] + 2) % 9


@pytest.mark.parametrize("side", ["both", "input", "output"])
def test_the_collator_knows_sides(side):
    rows = [list(range(n, n + (10 if side != "output" else 6))) for n in (0, 50)]
    batch = PatchCollator(2, side=side)(rows)
    expected = make_batch(np.array(rows), side, 4, 2, DocumentMasking())
    assert torch.equal(batch["input_ids"], expected.input_ids) and torch.equal(batch["labels"], expected.labels)


def stacked_loss():
    batch = next(iter(DataLoader(TokenStream(plan(), TOKENS), batch_size=2)))
    return multi_token_loss(torch.randn(*batch["labels"].shape[:-1], 16), batch["labels"] % 16, batch["label_weights"])


def dirty_optimizer():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight])
    weight.sum().backward()
    return optimizer


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PatchCollator(4)([range(10)]), DataError, "rows of 10 tokens for patches of 4.*rows of T·4 \\+ 4 tokens"),
        (lambda: PatchCollator(2)([range(8), range(6)]), DataError, "rows of 6, 8 tokens"),
        (lambda: PatchCollator(0), ConfigError, "patch_size is 0"),
        (lambda: plan(global_batch_size=6), ConfigError, "does not divide into samples of 32 tokens"),
        (
            lambda: plan(micro_batch_size=None, gradient_accumulation=3),
            ConfigError,
            "gradient_accumulation 3 on 1 ranks.*steps of 2 samples",
        ),
        (lambda: plan(gradient_accumulation=3), ConfigError, "micro_batch_size 2 together with gradient_accumulation 3"),
        (lambda: plan(micro_batch_size=0), ConfigError, "micro_batch_size is 0"),
        (lambda: listed(4), ConfigError, "stages: .*a mapping for each stage"),
        (lambda: listed({"patch_size": object()}), ConfigError, "stages: .*a mapping for each stage"),
        (lambda: plan(recipe="patchtrain"), ConfigError, "patch-train"),
        (lambda: TokenStream(plan(), TOKENS, gradient_accumulation=2), ConfigError, "middle of an accumulation.*build_plan"),
        (lambda: TokenStream(plan(), TOKENS, rank=2, world_size=2), ConfigError, "rank 2 of 2"),
        (lambda: TokenStream(plan(), TOKENS.view(50, 100)), DataError, r"array of int64 \[50, 100\]"),
        (lambda: TokenStream(plan(), ["text"]), DataError, "data of type list.*tokenized first"),
        (lambda: TokenStream(plan(), TOKENS[:50]), DataError, "fewer than one block"),
        (lambda: TokenStream(plan(), TOKENS, documents=DocumentMasking(eod_mask_loss=True)), ConfigError, "without eod_id"),
        (lambda: list(TokenStream(plan(), TOKENS, vocab_size=1000)), DataError, "ids from 0 to 999"),
        (lambda: TokenStream(plan(), TOKENS).seek(99), ConfigError, "step 99 is outside the plan"),
        (lambda: TokenStream(plan(), TOKENS).load_state_dict({"stage_index": 2, "stage_step": 0}), ConfigError, "plan of the run"),
        (lambda: switch_optimizer(dirty_optimizer(), plan().stages[1]), ConfigError, r"middle of an accumulation.*zero_grad"),
        (lambda: list(DataLoader(TokenStream(plan(), TOKENS), batch_size=None, num_workers=2)), ConfigError, "every token.*num_workers=0"),
        (lambda: DataLoader(TokenStream(plan(), TOKENS), batch_size=None, shuffle=True), ValueError, "shuffle"),
        (lambda: stacked_loss(), ValueError, r"label_weights .*\[2, 4\] for 4 labels.*batch_size=None"),
    ],
)
def test_wrong_use_gets_a_sentence(call, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        call()
