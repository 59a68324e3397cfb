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
from megatron_patch.raw_text.json_lines import shown_names
from megatron_patch.raw_text.large_documents import MOST_DOCUMENT_BYTES
from megatron_patch.requirements import how_to_install

_MOST_ROWS = 1 << 16
_MOST_BYTES = 1 << 26
_LISTED_COLUMNS = 50


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading .parquet files needs pyarrow, which is not installed",
            "an installation with the extra [parquet]",
            f"{how_to_install('pyarrow')}, or convert the files to .jsonl",
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
        DataError: pyarrow is not installed, the file is damaged, or a key is not a column of text.
    """
    arrow, parquet = _pyarrow()
    try:
        names = [_find_column(arrow, path, parquet.read_schema(path), key) for key in keys]
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
            if _is_ambiguous(file.metadata, keys):
                size = 1  # pyarrow keeps the dictionary of only one of the columns, so a batch could take any amount of memory
            # Group by group: Arrow cannot join the dictionaries of two groups inside of a struct.
            batches = (file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False) for group in groups)
            for batch in itertools.chain.from_iterable(batches):
                position += batch.num_rows
                if drop >= batch.num_rows:
                    drop -= batch.num_rows
                    continue
                batch, drop = batch.slice(drop), 0
                done = position - batch.num_rows
                for part in _divided(arrow, batch, names, path):
                    done += part.num_rows
                    sink = arrow.BufferOutputStream()
                    with arrow.ipc.new_stream(sink, part.schema) as stream:
                        stream.write_batch(part)
                    yield sink.getvalue().to_pybytes(), done, done / rows
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "complete Parquet files", "repair the file or remove it from --input, and run again"
        ) from error


def _divided(arrow: Any, batch: Any, names: Sequence[Sequence[str]], path: str) -> Iterator[Any]:
    """Yields the texts of a batch, a column for each of `names`, in parts of at most `_MOST_BYTES` of text, or of one row.

    Raises:
        DataError: a text is too long.
    """
    compute = arrow.compute
    columns = [_column(batch, path_of_names) for path_of_names in names]
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
        yield arrow.RecordBatch.from_arrays(texts, names=[str(number) for number in range(len(texts))])
        start = end


def _column(batch: Any, names: Sequence[str]) -> Any:
    """Returns a column, as an array with a dictionary; null where a struct that contains it is null.

    Args:
        batch: a batch of rows.
        names: name of a column; and, if it is a struct, names of fields inside of it.
    """
    import pyarrow.compute

    column = batch.column(names[0])
    for name in names[1:]:
        column = pyarrow.compute.struct_field(column, name)
    types = pyarrow.types
    if hasattr(column, "dictionary"):
        if not types.is_fixed_size_binary(column.type.value_type):
            return column
        column = column.dictionary_decode()
    if types.is_fixed_size_binary(column.type):
        column = column.cast(pyarrow.binary())
    plain = {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}  # views have no lengths
    return column.cast(plain.get(column.type, column.type)).dictionary_encode()


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


def _is_ambiguous(metadata: Any, keys: Sequence[str]) -> bool:
    """Returns whether a key is both the name of a column and the path of a field inside of another one."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    return any(paths.count(key) > 1 for key in keys)


def _find_column(arrow: Any, path: str, schema: Any, key: str) -> list[str]:
    """Returns the names that lead to the column of a key.

    A name may contain dots itself: of the names that exist, the longest counts first, as in JSON.

    Raises:
        DataError: the table lacks the key, has several columns of its name, or its column holds no text.
    """

    def find(kind: Any, names: Sequence[str]) -> tuple[list[str], Any] | None:
        if not names:
            return [], kind
        for count in range(len(names), 0, -1) if arrow.types.is_struct(kind) else ():
            name = ".".join(names[:count])
            if len(kind.get_all_field_indices(name)) > 1:
                raise DataError(
                    f"{path} has several columns {name!r}: it is not clear which one holds the text",
                    "tables whose columns have different names",
                    "rename one of them",
                )
            index = kind.get_field_index(name)
            if index >= 0 and (rest := find(kind.field(index).type, names[count:])) is not None:
                return [name, *rest[0]], rest[1]
        return None

    found = find(arrow.struct(list(schema)), key.split("."))
    if found is None:
        columns = list(itertools.islice(_leaves(arrow, schema, ""), _LISTED_COLUMNS))
        raise DataError(f"{path} has no column {key!r}", f"its columns: {shown_names(columns)}", "check --json-keys")
    names, kind = found
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = arrow.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    of_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if not any(is_text(kind) for is_text in (*strings, *of_bytes)):
        raise DataError(f"{path}: column {key!r} holds {kind}", "a column of strings, or of bytes that are UTF-8", "check --json-keys")
    return names


def _leaves(arrow: Any, fields: Any, begin: str) -> Iterator[str]:
    """Yields the names of columns, with dots for the fields of structs."""
    for field in fields:
        if arrow.types.is_struct(field.type) and field.type.num_fields:
            yield from _leaves(arrow, field.type, f"{begin}{field.name}.")
        else:
            yield begin + field.name


def texts_of_rows(data: bytes) -> list[list[str | bytes | None]]:
    """Returns for each key the values of an Arrow stream from `row_batches`: the text; None without one; bytes that are not UTF-8."""
    arrow, _ = _pyarrow()
    table = arrow.ipc.open_stream(data).read_all()
    columns = []
    for column in table.columns:
        try:
            values = column.to_pylist()
            if not (arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
                values = [value.decode("utf-8") if value is not None else None for value in values]
            columns.append(values)
        except UnicodeDecodeError:
            columns.append([_text(value) for value in column])
    return columns


def _text(value: Any) -> str | bytes | None:
    if not value.is_valid:
        return None
    raw: bytes = value.as_buffer().to_pybytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
