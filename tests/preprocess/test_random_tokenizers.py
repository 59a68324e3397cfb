"""Tokenizers at random: the ids that preprocessing writes are those of the libraries, and no text is lost on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_patch.preprocess.encode import Encoder, load_checked_tokenizer
from megatron_patch.preprocess.segments import segments, split_point_of
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches
from tests.preprocess import random_tokenizers

pytest.importorskip("fastokens")
pytest.importorskip("tiktoken")


def check(seed, folder):
    drawn = random_tokenizers.make(seed, folder)
    tokenizer = load_checked_tokenizer(drawn.settings)
    encoder = Encoder(drawn.settings, tokenizer)
    texts = random_tokenizers.texts_for(seed, drawn.tokens)
    expected = [drawn.encode(text) for text in texts]
    what = f"seed {seed}: {drawn.description}, {encoder.encoder_note}"
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):  # the second time, caches are full
        found, incomplete, without = [], 0, 0
        for batch in read_batches([FileRange(str(folder / "a.jsonl"))]):
            encoded = encoder.encode(parse_batch(batch, ("text",)))
            (column,) = encoded.columns
            found += [row.tolist() for row in np.split(column.tokens, np.cumsum(column.lengths)[:-1])]
            incomplete, without = incomplete + encoded.text_checks.incomplete, without + encoded.text_checks.without_tokens
        assert found == [row for row in expected if row], what
        assert without == sum(not row and bool(text.strip()) for text, row in zip(texts, expected, strict=True)), what
        assert not (drawn.whole and (incomplete or without)), what
    if (split_point := split_point_of(tokenizer)) is not None:
        text = texts[-3][:4000]
        fast = encoder.fast_encoder or tokenizer
        parts = list(segments((text[start : start + 300] for start in range(0, len(text), 300)), split_point))
        assert [int(token) for part in parts for token in fast.encode_flat([part])[0]] == drawn.encode(text), what
    return encoder.encoder_note


def test_ids_of_random_tokenizers_are_their_libraries_own(tmp_path):
    notes = [check(seed, tmp_path) for seed in range(40)]
    assert sum("fastokens, checked" in note for note in notes) > 10 and any("word cache" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(40, 2040, 100))
def test_ids_of_many_random_tokenizers_are_their_libraries_own(tmp_path, start):
    for seed in range(start, start + 100):
        check(seed, tmp_path)
