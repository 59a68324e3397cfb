"""The stream: over all stages, epochs, blends and ranks every token of every block is an input exactly once an epoch."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.stream_start import start_alone, write_sparse_dataset
from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import TokenCorpus, check_vocabulary, split_ranges
from megatron_patch.data.dataset_metadata import DatasetMetadata, write_metadata
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.ops.plain import IGNORE_INDEX
from megatron_patch.stages import LOOKAHEAD_TOKENS, Stage, StagePlan
from tests.data.streams import corpus_of, plan_of, write_numbers

ENTRIES = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9), st.sampled_from(["both", "both", "input", "output"])),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def corpora():
    with tempfile.TemporaryDirectory() as folder:
        yield {
            "a": corpus_of(Path(folder) / "a", 1500, 700, 411),
            "b": corpus_of(Path(folder) / "b", 1777),
            "c": corpus_of(Path(folder) / "c", 900, 1000),
        }


def all_spans(stream):
    """Spans of all samples of all stages, in order."""
    for index, stage in enumerate(stream.plan.stages):
        yield from stream.spans(index, np.arange(stage.samples))


@given(ENTRIES, st.integers(0, 99), st.integers(1, 5), st.integers(0, 3))
def test_each_token_is_an_input_once_an_epoch_over_all_stages(corpora, entries, seed, window, skip):
    plan = plan_of(entries)
    stream = TrainStream(plan, {"a": corpora["a"]}, (("a", 1.0),), "90,10,0", seed, window, skip)
    first, last = split_ranges(corpora["a"].num_tokens, "90,10,0")[0]
    counts = np.zeros(corpora["a"].num_tokens, dtype=int)
    for span in all_spans(stream):
        counts[span.start : span.start + span.length] += 1
    in_blocks = stream.blocks[0] * plan.block_tokens
    assert counts.sum() == plan.tokens
    assert counts[first + in_blocks :].sum() == 0, "held-out tokens, or tokens that fill no block, were read"
    epochs_begun = -(-plan.tokens // in_blocks) + (skip > 0)
    assert counts[:in_blocks].max() <= epochs_begun
    # The sequence of blocks continues: after any number of blocks, no token is more than one epoch ahead of another.
    if plan.last_block(len(plan.stages) - 1) * plan.block_tokens == plan.tokens and skip == 0:
        assert counts[:in_blocks].max() - counts[:in_blocks].min() <= 1


@given(st.integers(0, 99), st.floats(0.05, 0.95))
@settings(max_examples=20)
def test_blends_and_stages_with_their_own_blend_go_on_in_each_corpus(corpora, seed, weight):
    common = (("a", weight), ("b", 1 - weight))
    plan = plan_of([(4, 3, "both"), (1, 8, "both"), (2, 4, "both")], blend={1: (("b", 0.5), ("c", 0.5))})
    stream = TrainStream(plan, corpora, common, "1,0,0", seed, window_blocks=3)
    for index, name in enumerate(stream.names):
        counts = np.zeros(corpora[name].num_tokens, dtype=int)
        blocks = 0
        for span in all_spans(stream):
            if span.corpus == index:
                counts[span.start : span.start + span.length] += 1
                blocks += span.length
        if blocks <= stream.blocks[index] * plan.block_tokens:
            assert counts.max(initial=0) <= 1, f"{name}: a token twice before the epoch's end"
    for stage_index in range(3):
        for reading in stream.corpus_usage(stage_index):
            index = stream.names.index(reading.corpus)
            read = [
                sum(span.length for span in stream.spans(i, np.arange(plan.stages[i].samples)) if span.corpus == index)
                for i in range(stage_index + 1)
            ]
            assert reading.tokens == read[-1]
            assert reading.epochs == pytest.approx(read[-1] / plan.block_tokens / stream.blocks[index])
            assert reading.epochs_by_end == pytest.approx(sum(read) / plan.block_tokens / stream.blocks[index])
            stream.check_epochs({reading.corpus: stream.corpus_usage(2)[0].epochs_by_end + 9})


@given(ENTRIES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.data())
@settings(max_examples=25)
def test_the_order_is_the_same_for_any_ranks_micro_batches_and_resuming(corpora, entries, ranks, micro, prefetch, data):
    plan = plan_of(entries)
    split = StagePlan(tuple(Stage(**{**vars(stage), "micro_batch_size": micro}) for stage in plan.stages), plan.block_tokens)
    stream = TrainStream(split, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 5)
    index = data.draw(st.integers(0, len(entries) - 1))
    stage = split.stages[index]
    start = data.draw(st.integers(0, stage.steps - 1))
    loaders = [PatchLoader(stream, index, rank, ranks, DocumentMasking(), start_step=start, prefetch=prefetch) for rank in range(ranks)]
    try:
        for step in range(start, min(stage.steps, start + 3)):
            batches = [loader.next_step() for loader in loaders]
            spans = [span for micro_batch in zip(*batches, strict=True) for batch in micro_batch for span in batch.spans]
            expected = stream.spans(index, np.arange(step * stage.global_batch_size, (step + 1) * stage.global_batch_size))
            assert tuple(spans) == expected
    finally:
        for loader in loaders:
            loader.close()


@st.composite
def runs(draw):
    """A plan over several epochs of a blend, whose stages end anywhere and whose last block is not full, and the step where it stops."""
    entries = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 40), st.sampled_from(["both", "both", "output"])),
            min_size=1,
            max_size=3,
        )
    )
    own = draw(st.sampled_from([None, (("b", 0.7), ("c", 0.3)), (("c", 1.0),)]))
    plan = plan_of(entries, batch=draw(st.integers(1, 7)), micro=draw(st.integers(1, 3)), blend={len(entries) - 1: own} if own else None)
    last = plan.stages[-1]
    # The last stage may end inside a block.
    plan = StagePlan((*plan.stages[:-1], dataclasses.replace(last, steps=max(1, last.steps - draw(st.integers(0, 2))))), plan.block_tokens)
    stops = sorted(draw(st.lists(st.integers(0, plan.steps), max_size=3)))
    ranks = [draw(st.integers(1, 5)) for _ in range(len(stops) + 1)]
    return plan, list(zip([0, *stops], [*stops, plan.steps], ranks, strict=True))


@given(runs(), st.integers(0, 9), st.sampled_from([1, 3, 1024]), st.sampled_from([0, 2]), st.sampled_from(["1,0,0", "80,15,5"]))
@settings(max_examples=30)
def test_broken_off_anywhere_and_gone_on_with_on_other_ranks_every_token_is_read_as_often_as_is_due(
    corpora, run, seed, window, prefetch, split
):
    """Stages x epochs x blends x ranks x loaders ahead x resume points x changed world sizes: counted token by token, as loaders give them.

    Counted is what the batches hold, not what the stream says: in these corpora token i is i.
    """
    plan, legs = run
    blend = (("a", 0.5), ("b", 0.3), ("c", 0.2))
    stream = TrainStream(plan, corpora, blend, split, seed, window)
    counts = [np.zeros(corpus.num_tokens, dtype=int) for corpus in corpora.values()]
    for begin, end, ranks in legs:
        # Opened again, as a restarted process does.
        again = TrainStream(plan, {name: TokenCorpus(corpus.prefixes) for name, corpus in corpora.items()}, blend, split, seed, window)
        for step in range(begin, end):
            progress = plan.progress(step)
            stage = plan.stages[progress.stage_index]
            if step == begin or progress.stage_step == 0:
                loaders = [
                    PatchLoader(again, progress.stage_index, rank, ranks, DocumentMasking(), progress.stage_step, prefetch)
                    for rank in range(ranks)
                ]
            for loader in loaders:
                for batch in loader.next_step():
                    assert int((batch.labels[:, 0, 0] != IGNORE_INDEX).sum()) == len(batch.spans)
                    for row, span in zip(batch.input_ids.reshape(len(batch.input_ids), -1).numpy(), batch.spans, strict=False):
                        np.add.at(counts[span.corpus], row, 1)
            if step + 1 == end or progress.stage_step + 1 == stage.steps:
                for loader in loaders:
                    loader.close()
    due = [np.zeros(corpus.num_tokens, dtype=int) for corpus in corpora.values()]  # if the last block were read to its end
    for index, stage in enumerate(plan.stages):
        samples = (plan.last_block(index) - plan.first_block(index)) * (plan.block_tokens // stage.sample_tokens)
        for span in stream.spans(index, np.arange(samples)):
            due[span.corpus][span.start : span.start + span.length] += 1
    for index, (first, _) in enumerate(stream.ranges):
        inside = slice(first, first + stream.blocks[index] * plan.block_tokens)
        assert due[index].sum() == due[index][inside].sum(), "held-out tokens, or tokens that fill no block, are read"
        assert due[index][inside].max() - due[index][inside].min() <= 1, "a token is read again before all have been read"
        assert (counts[index] <= due[index]).all()
        corpus_usage = [
            r for stage_index in range(len(plan.stages)) for r in stream.corpus_usage(stage_index) if r.corpus == stream.names[index]
        ]
        assert due[index].sum() == sum(reading.tokens for reading in corpus_usage)
        assert not corpus_usage or corpus_usage[-1].epochs_by_end == pytest.approx(
            due[index].sum() / plan.block_tokens / stream.blocks[index]
        )
    assert sum(count.sum() for count in counts) == plan.tokens
    missing = sum((full - count).sum() for full, count in zip(due, counts, strict=True))
    assert missing == -plan.tokens % plan.block_tokens


def test_samples_hold_the_tokens_of_their_spans(corpora):
    plan = plan_of([(4, 3, "both"), (2, 2, "input"), (2, 2, "output"), (1, 3, "both")])
    stream = TrainStream(plan, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 1)
    for index, stage in enumerate(plan.stages):
        loader = PatchLoader(stream, index, 0, 1, DocumentMasking(), prefetch=0)
        for batch in loader.next_step():
            for row, span in enumerate(batch.spans):
                x = np.arange(span.start, span.start + span.length + stage.patch_size)
                for t in range(stage.positions):
                    k = stage.patch_size
                    if stage.side == "output":
                        assert batch.input_ids[row, t].tolist() == [x[t]]
                        assert batch.labels[row, t].tolist() == [x[t + 1 + j] for j in range(k)]
                    else:
                        assert batch.input_ids[row, t].tolist() == [x[t * k + j] for j in range(k)]
                        expected = [x[(t + 1) * k + j] for j in range(k)]
                        assert batch.labels[row, t].tolist() == (expected[:1] if stage.side == "input" else expected)


def test_a_run_in_two_parts_reads_what_one_run_reads(corpora):
    whole = plan_of([(4, 6, "both"), (1, 8, "both")])
    stream = TrainStream(whole, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 3)
    rest = StagePlan(whole.stages[1:], whole.block_tokens)
    skip = whole.first_block(1)
    second = TrainStream(rest, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 3, skip_blocks=skip)
    samples = np.arange(whole.stages[1].samples)
    assert second.spans(0, samples) == stream.spans(1, samples)


def test_seeds_give_other_orders_and_neighbours_are_apart(corpora):
    plan = plan_of([(1, 50, "both")])
    orders = [TrainStream(plan, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", seed).locate(0, np.arange(300))[1] for seed in (1, 2)]
    assert (orders[0] == orders[1]).mean() < 0.05
    assert (np.abs(np.diff(orders[0])) == 4).mean() < 0.05


def test_each_epoch_has_an_order_of_its_own(corpora):
    plan = plan_of([(1, 400, "both")])
    stream = TrainStream(plan, {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 3, window_blocks=1)
    spans, per_epoch = list(all_spans(stream)), stream.blocks[0] * (plan.block_tokens // plan.stages[0].sample_tokens)
    orders = [tuple(span.start for span in spans[start : start + per_epoch]) for start in (0, per_epoch)]
    assert len(spans) >= 2 * per_epoch and sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    blocks = [tuple(dict.fromkeys(start // plan.block_tokens for start in order)) for order in orders]
    assert blocks[0] != blocks[1], "the blocks themselves are in another order"


def test_start_up_does_not_depend_on_the_size_of_the_corpus(tmp_path):
    """10^12 tokens in 10^9 documents in sparse files: the last rank has its first micro-batch at once, and writes nothing."""
    prefix = write_sparse_dataset(tmp_path / "sparse", 10**12, 10**9)
    found = start_alone(prefix, 1023, 1024, 9_999)
    assert found["cpu_seconds"] < 2 and found["megabytes"] < 200
    assert {path.name for path in tmp_path.iterdir()} == {"sparse.bin", "sparse.idx"}
    stream = TrainStream(StagePlan((Stage("s", 4, 2048, 4, 8, 10**6),), 8192), {"x": TokenCorpus([prefix])}, (("x", 1.0),), "99,1,0", 1)
    assert stream.blocks[0] == (99 * 10**10 - LOOKAHEAD_TOKENS) // 8192


@pytest.mark.parametrize("split", ["", "a,b", "0,1,0", "1,-1,0", "1,2,3,4", "nan,1,0"])
def test_impossible_splits_are_refused(split):
    with pytest.raises(ConfigError, match="--split"):
        split_ranges(100, split)


def test_splits_cover_everything_once():
    train, valid, test = split_ranges(1000, "969,30,1")
    assert (train, valid, test) == ((0, 969), (969, 999), (999, 1000))
    assert split_ranges(1001, "969,30,1", align=8) == ((0, 968), (968, 1000), (1000, 1001))
    assert split_ranges(10, "1") == ((0, 10), (10, 10), (10, 10))


def test_too_little_data_is_refused(tmp_path):
    corpus = TokenCorpus([write_numbers(tmp_path / "tiny", 90)])
    with pytest.raises(DataError, match="fewer than one block of 32"):
        TrainStream(plan_of([(8, 1, "both")]), {"tiny": corpus}, (("tiny", 1.0),), "1,0,0", 1)


def info(prefix, vocab_size, tokens, size):
    write_metadata(prefix, DatasetMetadata("NullTokenizer", "9", vocab_size, None, 1, tokens, "int32", False, False, 1, size, 1, "", ""))


def test_a_vocabulary_larger_than_the_model_s_is_refused(tmp_path):
    prefix = write_numbers(tmp_path / "d", 100)
    with pytest.raises(DataError, match="token id 99.*50 ids"):
        check_vocabulary(TokenCorpus([prefix]), 50)
    check_vocabulary(TokenCorpus([prefix]), 100)
    info(prefix, 120, 100, 400)
    with pytest.raises(DataError, match="tokenized with 120 ids, but the model has 100"):
        check_vocabulary(TokenCorpus([prefix]), 100)
    info(prefix, 100, 99, 396)
    with pytest.raises(DataError, match="metadata file has 396"):
        check_vocabulary(TokenCorpus([prefix]), 100)


def test_an_id_outside_the_vocabulary_stops_the_loader_where_it_is(corpora):
    stream = TrainStream(plan_of([(1, 5, "both")]), {"a": corpora["a"]}, (("a", 1.0),), "1,0,0", 1)
    loader = PatchLoader(stream, 0, 0, 1, DocumentMasking(), prefetch=2, vocab_size=300)
    try:
        with pytest.raises(DataError, match=r"token id (\d+) in .*, token \1") as error:
            for _ in range(5):
                loader.next_step()
        assert "0 to 299" in str(error.value)
        with pytest.raises(DataError) as again:
            loader.next_step()
        assert again.value is error.value
    finally:
        loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


@pytest.mark.parametrize("blend", [(("a", 1.0), ("a", 1.0)), (("a", 1.0), ("z", 1.0))])
def test_a_blend_names_each_corpus_once(corpora, blend):
    with pytest.raises(DataError, match=r"(?s)a blend of .*Allowed: each of these corpora once: a, b"):
        TrainStream(plan_of([(1, 5, "both")]), {"a": corpora["a"], "b": corpora["b"]}, blend, "1,0,0", 1)


def test_fingerprints_tell_another_blend(corpora):
    def made(weight):
        both = {"a": corpora["a"], "b": corpora["b"]}
        return TrainStream(plan_of([(1, 5, "both")]), both, (("a", 1.0), ("b", weight)), "1,0,0", 1).fingerprint()

    assert made(2.0) == made(2.0) != made(3.0)


def test_fingerprints_tell_changed_data(tmp_path):
    prefix = write_numbers(tmp_path / "d", 5000)
    before = TokenCorpus([prefix]).fingerprint()
    assert TokenCorpus([prefix]).fingerprint() == before
    raw = bytearray(Path(prefix + ".bin").read_bytes())
    raw[1234] ^= 1
    Path(prefix + ".bin").write_bytes(raw)
    assert TokenCorpus([prefix]).fingerprint() != before
