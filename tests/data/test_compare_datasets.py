"""Comparing datasets finds every difference, against a comparison of Python's lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data import compare_datasets as module
from megatron_patch.data.compare_datasets import compare
from megatron_patch.data.dataset_metadata import DatasetMetadata, write_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter

documents = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=12)


def write(prefix, texts, dtype=np.uint16):
    with IndexedDatasetWriter(str(prefix), np.dtype(dtype)) as writer:
        for text in texts:
            writer.append(np.array(text, dtype), np.array([len(text)]))
        writer.finish()
    return IndexedDataset(str(prefix))


@given(documents, documents, st.booleans())
def test_differences_are_those_of_the_lists(tmp_path_factory, one, other, same):
    other = one if same else other
    folder = tmp_path_factory.mktemp("compare")
    usual, module._DOCUMENTS = module._DOCUMENTS, 5
    try:
        found = compare(write(folder / "a", one), write(folder / "b", other))
    finally:
        module._DOCUMENTS = usual
    differing = [number for number, (mine, theirs) in enumerate(zip(one, other)) if mine != theirs]  # noqa: B905
    assert found["equal"] == (one == other)
    assert found["differing_sequences"] == len(differing)
    assert found["first_sequence"] == (differing[0] if differing else None)
    if differing:
        mine, theirs = one[differing[0]], other[differing[0]]
        token = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))  # noqa: B905
        assert found["first_token"] == token


def test_types_and_metadata_count(tmp_path):
    one, other = write(tmp_path / "a", [[1, 2]]), write(tmp_path / "b", [[1, 2]], np.int32)
    assert compare(one, other)["differences"] == ["dtype: uint16 and int32"]
    info = DatasetMetadata("NullTokenizer", "9", 9, 8, 1, 2, "uint16", True, False, 1, 4, 62, "", "")
    third = write(tmp_path / "c", [[1, 2]])
    write_metadata(str(tmp_path / "a"), info)
    write_metadata(str(tmp_path / "c"), replace(info, tokenizer_model="elsewhere", run_xxh64="1"))
    assert compare(one, third)["equal"]
    write_metadata(str(tmp_path / "c"), replace(info, append_eod=False))
    assert compare(one, third)["differences"] == ["append_eod: True and False"]
