"""Documents inside patches, against a slow reading of the rules token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.collate import DocumentMasking, make_batch
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.evaluation_data import evaluation_batches, held_out_starts
from megatron_patch.ops import IGNORE_INDEX
from tests.data.streams import write_numbers

EOD = 0


def documents_by_hand(tokens):
    """The document of each token: a new one begins at a token that is not an EOD and follows one."""
    numbers, current = [], 0
    for i, token in enumerate(tokens):
        if i and tokens[i - 1] == EOD and token != EOD:
            current += 1
        numbers.append(current)
    return numbers


@given(st.lists(st.integers(0, 3), min_size=40, max_size=40), st.sampled_from([1, 2, 4]), st.sampled_from(["both", "input", "output"]))
def test_masks_follow_the_rules(tokens, k, side):
    positions = 6
    masking = DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True, ignore_repeated_eod=True)
    width = 1 if side == "output" else k
    x = tokens[: positions * width + k]
    batch = make_batch(np.array([x]), side, positions, k, masking)
    documents = documents_by_hand(x)
    previous, position, firsts = None, 0, []
    for t in range(positions):
        mine = documents[t * width + width - 1]
        position = 0 if mine != previous else position + 1
        firsts += [t] if position == 0 else []
        previous = mine
        assert batch.position_ids[0, t] == position
        where = [t + 1 + j for j in range(k)] if side == "output" else [(t + 1) * k + j for j in range(k)]
        for j, i in enumerate(where[:1] if side == "input" else where):
            repeated = x[i] == EOD and x[i - 1] == EOD
            expected = IGNORE_INDEX if documents[i] != mine or repeated else x[i]
            assert batch.labels[0, t, j] == expected
    if firsts == [0]:
        assert batch.documents is None, "one document needs no bounds"
    else:
        assert batch.documents.bounds.tolist() == [*firsts, positions]


def test_one_token_a_patch_is_megatron_s_rule():
    """Megatron leaves the loss out where the input is the end of a document, and restarts positions and attention after it."""
    x = np.array([[5, 6, EOD, 7, EOD, 8, 9, 4]])
    batch = make_batch(x, "both", 7, 1, DocumentMasking(EOD, True, True, True))
    assert batch.labels[0, :, 0].tolist() == [6, EOD, IGNORE_INDEX, EOD, IGNORE_INDEX, 9, 4]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch.documents.bounds.tolist() == [0, 3, 5, 7] and batch.documents.longest == 3


def test_documents_of_several_samples_are_counted_through():
    """One list of bounds for all samples: each begins a document, also the samples that are not scored."""
    x = np.array([[5, 6, EOD, 7, 1, 2], [5, 6, 7, 8, 1, 2], [0, 0, 0, 0, 0, 0]])
    batch = make_batch(x, "both", 5, 1, DocumentMasking(EOD, reset_attention_mask=True), scored_rows=2)
    assert batch.documents.bounds.tolist() == [0, 3, 5, 10, 15] and batch.documents.longest == 5
    assert batch.documents.bounds is batch.documents.host_bounds
    assert make_batch(x[1:], "both", 5, 1, DocumentMasking(EOD, reset_attention_mask=True)).documents is None


def test_without_masks_nothing_is_computed():
    batch = make_batch(np.array([[5, EOD, EOD, 7, 1, 2]]), "both", 2, 2, DocumentMasking(EOD))
    assert batch.documents is None and batch.position_ids is None
    assert batch.labels[0].tolist() == [[EOD, 7], [1, 2]]
    assert batch.input_ids.dtype == torch.int64 and batch.input_ids.is_contiguous()


def test_parts_of_the_positions_keep_the_documents_and_the_hash_of_all():
    tokens = np.array([[5, 6, EOD, 7, 1, 2, 3, 4, 5], [5, 6, 7, 8, 1, 2, EOD, 4, 5]])
    whole = make_batch(tokens, "both", 8, 1, DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=True))
    parts = [whole.part(index, 4) for index in range(4)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))
        assert all(getattr(part, name).is_contiguous() for part in parts)
    assert all(part.documents is whole.documents and part.content_hash() == whole.content_hash() for part in parts)
    assert whole.part(0, 1) is whole
    tokens[1, 7] += 1
    other = make_batch(tokens, "both", 8, 1, DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=True))
    assert other.part(0, 4).content_hash() != parts[0].content_hash(), "also where the difference is in another part"


def test_rows_that_fill_up_are_not_scored():
    batch = make_batch(np.ones((3, 6), dtype=np.int64), "both", 2, 2, DocumentMasking(), scored_rows=1)
    assert (batch.labels[1:] == IGNORE_INDEX).all() and (batch.labels[0] == 1).all()


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_evaluations_read_the_same_tokens_at_every_k_on_any_ranks(tmp_path_factory, ranks, micro, k):
    prefix = write_numbers(tmp_path_factory.mktemp("held_out") / "d", 1000)
    corpus = TokenCorpus([prefix])
    starts = held_out_starts((100, 900), 32, 64, 320)
    assert len(starts) == 10 and starts[0] == 100 and starts[-1] + 32 + 64 <= 900
    seen, lengths = [], set()
    for rank in range(ranks):
        batches = list(evaluation_batches(corpus, starts, 32, 8, k, micro, rank, ranks, DocumentMasking()))
        lengths.add(len(batches))
        for batch in batches:
            scored = (batch.labels != IGNORE_INDEX).all(dim=2).all(dim=1)
            seen += batch.input_ids[scored].flatten().tolist()
    assert len(lengths) == 1, "every rank brings the same number of batches"
    assert sorted(seen) == [int(start) + i for start in starts for i in range(32)]


def test_no_held_out_data_gives_no_starts():
    assert len(held_out_starts((0, 90), 32, 64, 320)) == 0
    assert len(held_out_starts((0, 96), 32, 64, 1)) == 1


def test_unknown_sides_do_not_pass_silently():
    with pytest.raises(ValueError, match="reshape"):
        make_batch(np.ones((1, 5), dtype=np.int64), "both", 2, 2, DocumentMasking())
