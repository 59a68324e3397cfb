"""Parquet files as batches of rows.

In: a path and keys. Out: the columns of the keys, a few rows at a time, as Arrow streams; and the texts of the rows of such a stream. A row
group is never held in memory completely. Needs `pyarrow`, which is an extra.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_patch.errors import DataError
from megatron_patch.raw_text.large_documents import MOST_DOCUMENT_BYTES

_MOST_ROWS = 1 << 16
_MOST_BYTES = 1 << 26


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading .parquet files needs pyarrow, which is not installed",
            "an installation with the extra: pip install 'megatron_patch[parquet]'",
            "install it, or convert the files to .jsonl",
        ) from error
    return pyarrow, pyarrow.parquet


def row_batches(path: str, keys: Sequence[str], start: int, batch_bytes: int) -> Iterator[tuple[bytes, int, float]]:
    """Yields the rows from index `start` on.

    Args:
        path: path of the Parquet file.
        keys: the columns to read, with dots for nested ones.
        start: index of the first row.
        batch_bytes: approximate number of bytes of text in a batch.

    Yields:
        The rows as an Arrow stream, the index of the row after them, the fraction of the file read so far.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or a key is not a column of strings.
    """
    arrow, parquet = _pyarrow()
    try:
        _check_columns(arrow, path, parquet.read_schema(path), keys)
        # A dictionary stores a repeated text once, and is kept as it is read. Otherwise a batch of rows with one long text would take
        # hundreds of gigabytes, out of a file of a few kilobytes.
        columns = list(dict.fromkeys(keys))
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=columns) as file:
            rows = file.metadata.num_rows
            groups, first = [], 0
            skipped = 0
            for number in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(number).num_rows
                if first + size > start:
                    groups.append(number)
                else:
                    skipped += size
                first += size
            position, drop = skipped, start - skipped
            if not groups or start >= rows:
                return
            size = max(1, min(_MOST_ROWS, batch_bytes * rows // max(1, _text_bytes(file.metadata, keys))))
            # Group by group: Arrow cannot join the dictionaries of two groups inside of a struct.
            batches = (file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False) for group in groups)
            for batch in itertools.chain.from_iterable(batches):
                position += batch.num_rows
                if drop >= batch.num_rows:
                    drop -= batch.num_rows
                    continue
                batch, drop = batch.slice(drop), 0
                done = position - batch.num_rows
                for part in _divided(arrow, batch, columns, path):
                    done += part.num_rows
                    sink = arrow.BufferOutputStream()
                    with arrow.ipc.new_stream(sink, part.schema) as stream:
                        stream.write_batch(part)
                    yield sink.getvalue().to_pybytes(), done, done / rows
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "complete Parquet files", "repair the file or remove it from --input, and run again"
        ) from error


def _divided(arrow: Any, batch: Any, keys: Sequence[str], path: str) -> Iterator[Any]:
    """Yields the texts of a batch, a column for each key, in parts of at most `_MOST_BYTES` of text, or of one row.

    Raises:
        DataError: a text is too long.
    """
    compute = arrow.compute
    columns = [_column(batch, key) for key in keys]
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in columns:
        lengths = compute.binary_length(column.dictionary).cast("int64").take(column.indices)
        sizes += compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    if sizes.size and int(sizes.max()) > MOST_DOCUMENT_BYTES:
        raise DataError(
            f"{path} has a document of more than {MOST_DOCUMENT_BYTES:,} bytes",
            f"documents of at most {MOST_DOCUMENT_BYTES:,} bytes",
            "remove the document or split it",
        )
    ends, start = np.cumsum(sizes), 0
    while start < batch.num_rows:
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _MOST_BYTES, side="right")))
        texts = [column.slice(start, end - start).dictionary_decode() for column in columns]
        yield arrow.RecordBatch.from_arrays(texts, names=list(keys))
        start = end


def _column(batch: Any, key: str) -> Any:
    """Returns the column of a key, as an array with a dictionary; null where a struct that contains it is null."""
    import pyarrow.compute

    first, *names = key.split(".")
    column = batch.column(first)
    for name in names:
        column = pyarrow.compute.struct_field(column, name)
    return column if hasattr(column, "dictionary") else column.dictionary_encode()


def _text_bytes(metadata: Any, keys: Sequence[str]) -> int:
    """Returns the uncompressed bytes of the keys' columns."""
    wanted = set(keys)
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in range(group.num_columns):
            if group.column(column).path_in_schema in wanted:
                total += int(group.column(column).total_uncompressed_size)
    return total


def _check_columns(arrow: Any, path: str, schema: Any, keys: Sequence[str]) -> None:
    """Raises a DataError if the table lacks a key, before any row is read."""
    for key in keys:
        kind: Any = arrow.struct(list(schema))
        for name in key.split("."):
            index = kind.get_field_index(name) if arrow.types.is_struct(kind) else -1
            if index < 0:
                raise DataError(f"{path} has no column {key!r}", f"its columns: {', '.join(schema.names)}", "check --json-keys")
            kind = kind.field(index).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            raise DataError(f"{path}: column {key!r} holds {kind}", "a column of strings", "check --json-keys")


def texts_of_rows(data: bytes, keys: Sequence[str]) -> list[list[str | None]]:
    """Returns for each key the texts of an Arrow stream from `row_batches`; None where a row has no text, or one that is not UTF-8."""
    arrow, _ = _pyarrow()
    table = arrow.ipc.open_stream(data).read_all()
    columns = []
    for key in keys:
        column = table.column(key)
        try:
            columns.append(column.to_pylist())
        except UnicodeDecodeError:
            columns.append([_text(value) for value in column])
    return columns


def _text(value: Any) -> str | None:
    try:
        found: str | None = value.as_py()
        return found
    except UnicodeDecodeError:
        return None
