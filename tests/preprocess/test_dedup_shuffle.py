"""Repeated documents left out and documents shuffled: against Python's sets and lists, over every size of chunk, part and bucket."""

from __future__ import annotations

import collections
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.errors import DataError
from megatron_patch.preprocess import dedup_shuffle as module
from megatron_patch.preprocess.dedup_shuffle import dedup_and_shuffle
from megatron_patch.preprocess.merge import merge_datasets

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def write(prefix, documents):
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.append(np.array(document, np.uint16), np.array([len(document)]))
        writer.finish()
    return str(prefix)


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    assert not integrity_problems(dataset)
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


@pytest.fixture(params=[(3, 5, 40), (1 << 16, 1 << 24, 1 << 26)], ids=["tiny", "usual"])
def sizes(request, monkeypatch):
    for name, value in zip(("_DOCUMENTS", "_MASK_DOCUMENTS", "_PART_BYTES"), request.param, strict=True):
        monkeypatch.setattr(module, name, value)


def read_documents(prefix):
    """The documents, of which some have no sequence."""
    dataset = IndexedDataset(str(prefix))
    assert not integrity_problems(dataset)
    sequences = [dataset[i].tolist() for i in range(len(dataset))]
    bounds = dataset.document_boundaries[0 : dataset.num_documents + 1].tolist()
    return [tuple(itertools.chain(*sequences[begin:end])) for begin, end in itertools.pairwise(bounds)]


documents = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=4).map(tuple), max_size=40)


@given(documents, st.integers(1, 8), st.integers(1, 8), st.integers(1, 60))
@settings(max_examples=60)
def test_the_first_of_equal_documents_stays(tmp_path_factory, texts, chunk, mask, part):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_DOCUMENTS", chunk), ("_MASK_DOCUMENTS", mask), ("_PART_BYTES", part)):
            patch.setattr(module, name, value)
        folder = tmp_path_factory.mktemp("dedup")
        left_out = dedup_and_shuffle(write(folder / "a", texts), str(folder / "b"), True, None, folder / "scratch")
    assert read_documents(folder / "b") == list(dict.fromkeys(texts))
    assert left_out == len(texts) - len(set(texts)) and not (folder / "scratch").exists()


def test_a_shuffle_is_a_permutation_that_the_seed_decides(tmp_path, sizes):
    texts = [(i % 7,) * (i % 5 + 1) + (i,) if i % 50 else () for i in range(300)]
    source = write(tmp_path / "a", texts)

    def shuffled(seed, dedup=False):
        dedup_and_shuffle(source, str(tmp_path / "b"), dedup, seed, tmp_path / "scratch")
        return read_documents(tmp_path / "b")

    one = shuffled(1)
    assert one != texts and sorted(one) == sorted(texts)
    assert shuffled(1) == one != shuffled(2)
    assert sorted(shuffled(1, dedup=True)) == sorted(set(texts))


def test_all_orders_come_equally_often(tmp_path, monkeypatch):
    """Chi squared over the 24 orders of 4 documents, in two buckets; 49.7 is its 99.9 % point at 23 degrees of freedom."""
    monkeypatch.setattr(module, "_parts", lambda total: 2)
    source = write(tmp_path / "a", [(i,) for i in range(4)])
    counts = collections.Counter()
    for seed in range(480):
        dedup_and_shuffle(source, str(tmp_path / "b"), False, seed, tmp_path / "scratch")
        counts[tuple(map(tuple, read(tmp_path / "b")))] += 1
    orders = list(itertools.permutations([(i,) for i in range(4)]))
    assert sum((counts[order] - 20) ** 2 / 20 for order in orders) < 49.7


def test_merging_rearranges_over_all_shards(tmp_path, sizes):
    shards = [[(1, 2), (3,), (1, 2)], [], [(3,), (4, 5)], [(1, 2), (6,)]]
    prefixes = [write(tmp_path / f"s{i}", shard) for i, shard in enumerate(shards)]
    merged = merge_datasets(prefixes, str(tmp_path / "all"), dedup=True)
    assert read(tmp_path / "all") == [(1, 2), (3,), (4, 5), (6,)]
    assert (merged.duplicates, merged.documents, merged.tokens) == (3, 4, 6)
    merge_datasets(prefixes, str(tmp_path / "shuffled"), dedup=True, shuffle_seed=5)
    assert sorted(read(tmp_path / "shuffled")) == sorted(read(tmp_path / "all"))
    assert not list(tmp_path.glob("*partial*")) + list(tmp_path.glob("*scratch*"))


def test_documents_of_several_sequences_are_refused(tmp_path):
    prefix = write(tmp_path / "a", [(1,), (2,)])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[26:34] = (2).to_bytes(8, "little")  # two boundaries: one document of two sequences
    Path(prefix + ".idx").write_bytes(raw[: 34 + 24] + (0).to_bytes(8, "little") + (2).to_bytes(8, "little"))
    with pytest.raises(DataError, match="2 sequences in 1 document"):
        dedup_and_shuffle(prefix, str(tmp_path / "b"), True, None, tmp_path / "scratch")
    # As many documents as sequences: one has both, the other none.
    Path(prefix + ".idx").write_bytes(raw[:26] + struct.pack("<Q", 3) + raw[34 : 34 + 24] + struct.pack("<3q", 0, 2, 2))
    with pytest.raises(DataError, match="2 sequences in 2 documents"):
        dedup_and_shuffle(prefix, str(tmp_path / "b"), True, None, tmp_path / "scratch")
