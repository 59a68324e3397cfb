"""Files made to exhaust memory or disk: a few megabytes that decompress to far more than any text does."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from megatron_patch.errors import DataError
from megatron_patch.raw_text import compression, inputs, readers
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.readers import read_batches

ROOT = Path(__file__).parent.parent.parent
WRITERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.fixture
def low_limits(monkeypatch):
    monkeypatch.setattr(compression, "UNCHECKED_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "MOST_DOCUMENT_BYTES", 1 << 22)


def read(path: Path, **options) -> bytes:
    return b"".join(batch.read() for batch in read_batches([FileRange(str(path))], **options))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_decompresses_to_far_more_than_text_is_refused(tmp_path, low_limits, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(WRITERS[suffix](b'{"text": "a"}\n' * (1 << 18)))
    with pytest.raises(DataError, match="decompresses to more than 500 times.*\n.*Allowed.*\n.*What to do: remove it") as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_repetitive_text_and_small_files_are_read(tmp_path, low_limits, suffix):
    line = b'{"text": "' + bytes(range(97, 123)) * 3 + b'"}\n'
    many = b"".join(line[:12] + str(number).encode() + line[12:] for number in range(10_000))
    for name, data in (("many", many), ("small", line * 5000)):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(WRITERS[suffix](data))
        assert len(data) / path.stat().st_size > (20 if name == "many" else 50)
        assert read(path) == data


@pytest.mark.parametrize("suffix", ["", *WRITERS])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_document_without_end_is_refused_before_it_fills_the_memory(tmp_path, low_limits, monkeypatch, suffix, kind):
    monkeypatch.setattr(compression, "MOST_RATIO", 1 << 40)
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(WRITERS.get(suffix, bytes)(b"x" * (6 << 20)))
    with pytest.raises(DataError, match=r"a document of more than 4,194,304 bytes\n.*\n.*What to do"):
        read(path, separator=b"\n\n")


def test_a_sparse_file_is_refused_without_reading_all_of_it(tmp_path, low_limits, monkeypatch):
    """A terabyte of zeros takes no space on disk, and an hour to read."""
    monkeypatch.setattr(inputs, "MOST_DOCUMENT_BYTES", 1 << 22)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="more than 4,194,304 bytes"):
        read(path)
    assert [part.start for part in inputs.shard_inputs([str(path)], 1, 2)] == [(1 << 39) + (1 << 22) + (1 << 16) - 1]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("zeros", range(9))
def test_several_frames_and_padding(tmp_path, suffix, zeros):
    """Frames follow each other. Padding is allowed where the formats' own programs allow it: xz asks for a multiple of 4, zstd for none."""
    one, two = (WRITERS[suffix](text * 1000) for text in (b'{"text": "a"}\n', b'{"text": "b"}\n'))
    padding = bytes(zeros)
    path = tmp_path / f"a.jsonl{suffix}"
    allowed = zeros == 0 or suffix in (".gz", ".bz2") or (suffix == ".xz" and zeros % 4 == 0)
    for data in (one + padding + two, one + two + padding):
        path.write_bytes(data)
        if allowed:
            assert read(path) == b'{"text": "a"}\n' * 1000 + b'{"text": "b"}\n' * 1000
        else:
            with pytest.raises(DataError, match=r"a\.jsonl.* cannot be read"):
                read(path)
    if zeros:
        path.write_bytes(padding + one)
        with pytest.raises(DataError, match=r"a\.jsonl.* cannot be read"):
            read(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_damaged_or_truncated_frame_is_never_taken_for_the_end(tmp_path, suffix):
    one, two = (WRITERS[suffix](text * 1000) for text in (b'{"text": "a"}\n', b'{"text": "b"}\n'))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in range(1, len(two)):
        path.write_bytes(one + two[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            read(path)
    for rest in (b"garbage", b"\x00\x00\x00\x00garbage", two[:2] + bytes([two[2] ^ 255]) + two[3:]):
        path.write_bytes(one + rest)
        with pytest.raises(DataError, match="cannot be read"):
            read(path)


def test_a_file_that_needs_a_dictionary_says_so(tmp_path):
    line = b'{"text": "a"}\n'
    dictionary = zstandard.train_dictionary(1024, [b'{"text": "%d %d"}' % (n, n * n) for n in range(2000)])
    path = tmp_path / "a.jsonl.zst"
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(line)
    for data in (packed, zstandard.compress(line) + packed, b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + packed):
        path.write_bytes(data)
        with pytest.raises(
            DataError, match=rf"compressed with a dictionary \(its id is {dictionary.dict_id()}\).*\n.*\n.*without one: zstd"
        ):
            read(path)


def declared_window(path: Path, window_log: int, data: bytes, content_size: bool = False) -> None:
    """Writes a small .zst file that declares a large window."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, write_content_size=content_size)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(data) + compressor.flush())


@pytest.mark.parametrize(("window_log", "told"), [(20, False), (27, False), (28, True), (31, True)])
def test_windows_of_zstd_up_to_2_gib_are_read_and_told(tmp_path, window_log, told):
    path, notices = tmp_path / "a.jsonl.zst", []
    declared_window(path, window_log, b'{"text": "a"}\n')
    path.write_bytes(path.read_bytes() * 2)
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert read(path, notice=notices.append) == b'{"text": "a"}\n' * 2
    assert len(notices) == told and all(f"{path} has a window of {1 << window_log - 20:,} MiB" in text for text in notices)


def test_a_larger_window_of_zstd_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    declared_window(path, 31, b'{"text": "a"}\n')
    data = bytearray(path.read_bytes())
    assert data[5] == (31 - 10) << 3
    data[5] += 1  # 2 GiB and an eighth
    path.write_bytes(data)
    with pytest.raises(DataError, match="a window of 2,415,919,104 bytes.*\n.*2,147,483,648 bytes.*--long=31.*\n.*What to do"):
        read(path)


def test_frames_of_zstd_that_are_skipped(tmp_path):
    """A seekable file ends with a table in such a frame, and pzstd begins each frame with one."""
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + zstandard.compress(b"a\n") + skipped * 2 + zstandard.compress(b"b\n") + skipped)
    assert read(path) == b"a\nb\n"


@pytest.mark.parametrize("error", [MemoryError(), zstandard.ZstdError("Allocation error : not enough memory")])
@pytest.mark.parametrize("suffix", WRITERS)
def test_too_little_memory_is_told(tmp_path, monkeypatch, suffix, error):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(WRITERS[suffix](b'{"text": "a"}\n'))

    class Failing:
        def read(self, size):
            raise error

    monkeypatch.setattr(compression, "_decompressed", lambda *_: Failing())
    with pytest.raises(DataError, match="cannot be decompressed: there is not enough memory\n.*Allowed.*\n.*What to do"):
        read(path)


@pytest.mark.parametrize("size_bits", [38, 39, 40])  # 2, 3 and 4 GiB
def test_an_xz_file_cannot_demand_any_amount_of_memory(tmp_path, size_bits):
    path = tmp_path / "a.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(b'{"text": "a"}\n', filters=filters))
    # The size of the dictionary is one byte of the block's header, which has its own checksum.
    header = data[12 : 12 + (data[12] + 1) * 4]
    at = bytes(header).index(b"\x21\x01") + 2
    header[at] = size_bits
    header[-4:] = zlib.crc32(bytes(header[:-4])).to_bytes(4, "little")
    data[12 : 12 + len(header)] = header
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="needs more than 512 MiB of memory.*dictionary is larger\n.*at most 512 MiB.*\n.*xz -dc FILE"):
        read(path)


def test_a_table_of_one_long_text_takes_little_memory(tmp_path):
    """60,000 rows of one text of 4 MiB: 240 GB of text in a file of a few kilobytes."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = arrow.DictionaryArray.from_arrays(arrow.array([0] * 60_000, arrow.int32()), arrow.array(["ab " * (1 << 20)]))
    sink = io.BytesIO()
    parquet.write_table(
        arrow.table({"text": text}), sink, use_dictionary=True, dictionary_pagesize_limit=1 << 30, compression="zstd", store_schema=False
    )
    (tmp_path / "a.parquet").write_bytes(sink.getvalue())
    assert len(sink.getvalue()) < 1 << 16
    program = f"""
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches
rows = 0
for batch in read_batches([FileRange({str(tmp_path / "a.parquet")!r})]):
    (texts,) = parse_batch(batch, ("text",)).columns
    rows += len(texts)
    assert set(map(len, texts)) == {{3 << 20}} and batch.next_unit == rows
    if rows > 100:
        break
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
    limit = 4 << 30
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1_200_000, "KiB"
