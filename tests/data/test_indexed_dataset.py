"""Megatron's file format in both directions, and every way in which files can be broken.

The golden files were written by the builder of megatron-core 0.16.1; where that package is installed, it also reads what we write.
"""

from __future__ import annotations

import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data import inspect
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset import IndexedDataset, optimal_dtype
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.inspect import describe, integrity_problems, patch_statistics
from megatron_patch.errors import DataError
from megatron_patch.preprocess.merge import merge_datasets

GOLDEN = Path(__file__).parent / "golden"
DOCUMENTS = [[5, 6, 7, 8, 1], [9, 1], [2, 3, 4, 40000, 65000, 1], [1]]
OFFSET = {"uint16": 0, "int32": 70000}


def write(prefix, documents, dtype="uint16"):
    with IndexedDatasetWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=dtype), np.array([len(document)]))
        writer.finish()
    return str(prefix)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_are_those_of_megatron_byte_for_byte(tmp_path, dtype):
    documents = [[token + OFFSET[dtype] for token in document] for document in DOCUMENTS]
    prefix = write(tmp_path / "mine", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == (GOLDEN / f"{dtype}{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatrons_files_are_read(dtype):
    dataset = IndexedDataset(str(GOLDEN / dtype))
    assert [[int(t) - OFFSET[dtype] for t in dataset[i]] for i in range(len(dataset))] == DOCUMENTS
    assert dataset.num_documents == 4 and dataset.num_tokens == 14 and str(dataset.dtype) == dtype
    assert not integrity_problems(dataset)


EMPTY_DOCUMENTS = [[], [5, 6, 1], [], [], [7, 65000, 1], [1], []]


@pytest.mark.parametrize("at_once", [False, True])
def test_documents_without_sequences_are_those_of_megatron(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("megatron_patch.data.indexed_dataset_writer._CHUNK", 1 << 20 if at_once else 8)
    prefix = str(tmp_path / "mine")
    if at_once:
        with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
            flat = [token for document in EMPTY_DOCUMENTS for token in document]
            writer.append(np.array(flat, np.uint16), np.array(list(map(len, EMPTY_DOCUMENTS))))
            writer.finish()
    else:
        write(prefix, EMPTY_DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == (GOLDEN / f"empty_documents{suffix}").read_bytes()
    dataset = IndexedDataset(prefix)
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (7, 3, 7) and not integrity_problems(dataset)
    assert describe(dataset)["documents"] == 7 and patch_statistics(dataset, 2, 1)["spanning_documents"] == 1


def test_megatron_reads_ours(tmp_path):
    reader = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    dataset = reader.IndexedDataset(write(tmp_path / "mine", DOCUMENTS))
    assert [list(map(int, dataset[i])) for i in range(len(dataset))] == DOCUMENTS
    assert list(dataset.document_indices) == [0, 1, 2, 3, 4]


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=30), min_size=1, max_size=20), st.data())
def test_what_is_written_is_read(tmp_path_factory, documents, data):
    prefix = write(tmp_path_factory.mktemp("written") / "d", documents)
    dataset = IndexedDataset(prefix)
    flat = [token for document in documents for token in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))
    assert dataset.tokens(start, count).tolist() == flat[start : start + count]
    assert not integrity_problems(dataset)


def test_the_dtype_follows_megatrons_bound():
    assert optimal_dtype(65499) == np.uint16 and optimal_dtype(65500) == np.int32


def test_nothing_appears_before_it_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(str(tmp_path / "d"), np.dtype("uint16")) as writer:
        writer.append(np.array([1, 2], dtype=np.uint16), np.array([2]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_ids_must_fit_and_lengths_must_add_up(tmp_path):
    with IndexedDatasetWriter(str(tmp_path / "d"), np.dtype("uint16")) as writer:
        with pytest.raises(DataError, match="70000 do not fit uint16"):
            writer.append(np.array([70000]), np.array([1]))
        with pytest.raises(DataError, match="2 documents"):
            writer.append(np.array([1]), np.array([2, -1]))
        with pytest.raises(DataError, match="1 document of 2 tokens in all, for 1 token\n"):
            writer.append(np.array([1]), np.array([2]))
        with pytest.raises(DataError, match="32 bits"):
            writer.append(np.array([1]), np.array([1 << 31]))


def test_a_writer_that_cannot_begin_leaves_nothing_behind(tmp_path):
    (tmp_path / "d.lengths.partial").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        IndexedDatasetWriter(str(tmp_path / "d"), np.dtype("uint16"))
    assert [path.name for path in tmp_path.iterdir()] == ["d.lengths.partial"]


@pytest.fixture
def prefix(tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"uint16{suffix}", tmp_path / f"d{suffix}")
    return str(tmp_path / "d")


def patch_bytes(path, offset, data):
    raw = bytearray(Path(path).read_bytes())
    raw[offset : offset + len(data)] = data
    Path(path).write_bytes(raw)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: Path(p + ".bin").unlink(), r"\.bin does not exist"),
        (lambda p: Path(p + ".idx").unlink(), r"\.idx does not exist"),
        (lambda p: Path(p + ".bin").write_bytes(Path(p + ".bin").read_bytes()[:-2]), "its index ends at byte 28"),
        (lambda p: Path(p + ".bin").write_bytes(Path(p + ".bin").read_bytes()[:-1]), "not a multiple of 2"),
        (lambda p: Path(p + ".idx").write_bytes(Path(p + ".idx").read_bytes()[:-5]), "its header requires"),
        (lambda p: Path(p + ".idx").write_bytes(b"MMID"), "not an index"),
        (lambda p: Path(p + ".idx").write_bytes(b""), "not an index"),
        (lambda p: patch_bytes(p + ".idx", 0, b"XXXX"), "not an index"),
        (lambda p: patch_bytes(p + ".idx", 9, struct.pack("<Q", 2)), "version 2"),
        (lambda p: patch_bytes(p + ".idx", 17, b"\x07"), "dtype code 7"),
        (lambda p: patch_bytes(p + ".idx", 17, b"\x63"), "dtype code 99"),
        (lambda p: patch_bytes(p + ".idx", 34 + 16 + 24, struct.pack("<q", 1000)), "its index ends at"),
        (lambda p: patch_bytes(p + ".idx", 34 + 16 + 32, struct.pack("<q", 1)), "documents begin at sequence 1"),
    ],
)
def test_broken_files_are_named(prefix, break_it, words):
    break_it(prefix)
    with pytest.raises(DataError, match=words):
        IndexedDataset(prefix)


def write_index(prefix, code, dtype, sequences, boundaries=None):
    """Any code with tokens of any type."""
    arrays = [np.array(sequence, dtype=dtype) for sequence in sequences]
    lengths = np.array([len(array) for array in arrays], "<i4")
    pointers = np.cumsum([0, *(array.nbytes for array in arrays)])[:-1].astype("<i8") if arrays else np.zeros(0, "<i8")
    documents = np.arange(len(arrays) + 1).astype("<i8") if boundaries is None else np.array(boundaries, "<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(arrays), len(documents))
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    Path(f"{prefix}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    return str(prefix)


SEQUENCES = {
    "many": [[], [5, 6, 7], [], [8], [9, 10]],
    "one": [[5, 6, 7]],
    "last has none": [[7], []],
    "only the last": [[], [], [7, 60000]],
    "zeros": [[0, 0], [0]],
    "thousands without": [*[[]] * 9000, [1, 2, 3], []],
}


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize(
    ("code", "written", "read"),
    [
        *[(code, dtype, dtype) for code, dtype in [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")]],
        *[(6, "u2", "u2"), (7, "u4", "i4"), (8, "u8", "i8")],
    ],
)
def test_every_code_of_megatron_and_of_deepspeed_is_read(tmp_path, code, written, read, sequences):
    if max(itertools.chain(*sequences)) > np.iinfo(written).max:
        sequences = [[token % 100 for token in sequence] for sequence in sequences]
    dataset = IndexedDataset(write_index(tmp_path / "d", code, written, sequences))
    assert describe(dataset)["dtype"] == np.dtype(written).name
    assert dataset.dtype == np.dtype(read) and [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert not integrity_problems(dataset)
    merge_datasets([dataset.prefix, dataset.prefix], str(tmp_path / "twice"))
    assert IndexedDataset(str(tmp_path / "twice")).tokens(0, 2 * dataset.num_tokens).tolist() == 2 * list(itertools.chain(*sequences))


@pytest.mark.parametrize(("code", "dtype"), [(6, "f8"), (6, "f4"), (7, "f4"), (7, "f8")])
@pytest.mark.parametrize("sequences", [[[], [1.0, 2.5], [0.0], []], [[0.0, -1e-30]]])
def test_floats_are_no_tokens(tmp_path, code, dtype, sequences):
    """Megatron's and GPT-NeoX's codes."""
    with pytest.raises(DataError, match=rf"dtype code {code} and \d bytes for each token.*{np.dtype(dtype)}.*\n.*whole numbers"):
        IndexedDataset(write_index(tmp_path / "d", code, dtype, sequences))


@pytest.mark.parametrize("sequences", [[], [[], []]])
def test_a_code_that_nothing_decides_is_an_error(tmp_path, sequences):
    for code in (6, 7):
        with pytest.raises(DataError, match=rf"dtype code {code} .*no sequence has a token by which to tell them apart"):
            IndexedDataset(write_index(tmp_path / f"d{code}", code, "u2", sequences))
    assert IndexedDataset(write_index(tmp_path / "d8", 8, "u2", sequences)).dtype == np.uint16


def test_a_code_whose_offsets_fit_no_writer_is_an_error(tmp_path):
    for code, dtype in [(6, "u1"), (7, "u2"), (7, "u1"), (0, "u2"), (9, "u2")]:
        with pytest.raises(DataError, match=f"dtype code {code}"):
            IndexedDataset(write_index(tmp_path / "d", code, dtype, [[1, 2], [3]]))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
def test_deepspeeds_own_files_are_read(tmp_path, dtype):
    writer = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    builder = writer.MMapIndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=getattr(np, dtype))
    for document in [[5, 6, 7, 100], [9], [2, 3]]:
        builder.add_item_numpy(np.array(document))
        builder.end_document()
    builder.finalize(f"{tmp_path}/d.idx")
    dataset = IndexedDataset(f"{tmp_path}/d")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 7, 100], [9], [2, 3]]
    assert TokenCorpus([dataset.prefix]).read(0, 7).tolist() == [5, 6, 7, 100, 9, 2, 3]


def test_the_full_check_finds_what_opening_cannot(prefix):
    patch_bytes(prefix + ".idx", 34 + 16 + 8, struct.pack("<q", 4))
    assert any("sequence 1 begins at byte 4, not 10" in problem for problem in integrity_problems(IndexedDataset(prefix)))
    assert any("token 10 is 40000" in problem for problem in integrity_problems(IndexedDataset(str(GOLDEN / "uint16")), vocab_size=100))


def test_reading_outside_is_refused(prefix):
    dataset = IndexedDataset(prefix)
    with pytest.raises(DataError, match="tokens 10 to 20"):
        dataset.tokens(10, 10)
    with pytest.raises(IndexError):
        dataset[4]


def test_descriptions_and_patches(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "d", [[3, 4, 5, 0], [6, 0], [7, 7, 8, 0, 0, 0]]))
    assert describe(dataset)["tokens_per_sequence"][-1] == 6
    # patches of 4: [3 4 5 0] [6 0 7 7] [8 0 0 0]: the second spans two documents; the second and third repeat a token
    found = patch_statistics(dataset, 4, eod_id=0)
    assert (found["patches"], found["spanning_documents"], found["repeating_a_token"], found["padding_tokens"]) == (3, 1, 2, 2)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=9), st.integers(2, 5), st.sampled_from([None, 0]))
def test_patches_are_counted_as_one_by_one(tmp_path_factory, documents, patch_size, eod_id):
    """With and without end-of-document tokens, in pieces of a few documents."""
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("p") / "d", documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "_CHUNK", 3)
        patch.setattr(inspect, "_MOST_TOKENS", 20)
        found = patch_statistics(dataset, patch_size, eod_id)
    tokens = [(number, token) for number, document in enumerate(documents) for token in document][:20]
    tokens = tokens[: len(tokens) // patch_size * patch_size]
    patches = [tokens[start : start + patch_size] for start in range(0, len(tokens), patch_size)]
    assert found["patches"] == len(patches)
    assert found["spanning_documents"] == sum(patch[0][0] != patch[-1][0] for patch in patches)
    assert found["repeating_a_token"] == sum(len({token for _, token in patch}) < patch_size for patch in patches)
    ends = sum(one[1] == eod_id == other[1] for one, other in itertools.pairwise(tokens))
    assert found["padding_tokens"] == (None if eod_id is None else ends)
