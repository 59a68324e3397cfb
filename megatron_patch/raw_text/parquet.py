"""Parquet files as batches of rows.

In: a path and keys. Out: the columns of the keys, a few rows at a time, as Arrow streams; and the texts of the rows of such a stream. A row
group is never held in memory completely. Needs `pyarrow`, which is an extra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_patch.errors import DataError

_MOST_ROWS = 1 << 16


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
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
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_columns(arrow, path, file.schema_arrow, keys)
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
            for batch in file.iter_batches(size, row_groups=groups, columns=list(dict.fromkeys(keys)), use_threads=False):
                position += batch.num_rows
                if drop >= batch.num_rows:
                    drop -= batch.num_rows
                    continue
                batch, drop = batch.slice(drop), 0
                sink = arrow.BufferOutputStream()
                with arrow.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield sink.getvalue().to_pybytes(), position, position / rows
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "complete Parquet files", "repair the file or remove it from --input, and run again"
        ) from error


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
        names = key.split(".")
        column = table.column(names[0])
        for name in names[1:]:
            column = arrow.chunked_array([_field(chunk, name) for chunk in column.chunks])
        try:
            columns.append(column.to_pylist())
        except UnicodeDecodeError:
            columns.append([_text(value) for value in column])
    return columns


def _field(struct: Any, name: str) -> Any:
    """Returns a field of a struct array; null where the struct is null."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(struct, name)


def _text(value: Any) -> str | None:
    try:
        found: str | None = value.as_py()
        return found
    except UnicodeDecodeError:
        return None
