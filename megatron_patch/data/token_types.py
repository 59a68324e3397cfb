"""Which type of numbers the tokens of a dataset have.

In: the code in its index, and the offsets and lengths of its sequences. Out: a dtype, or a DataError. Writers disagree on three codes:

| code | Megatron | GPT-NeoX | DeepSpeed |
| --- | --- | --- | --- |
| 6 | float64 | float32 | uint16 |
| 7 | float32 | float64 | uint32 |
| 8 | uint16 | uint16 | uint64 |

The bytes from one sequence to the next, divided by its length, are the size of a token. Where that leaves uint32 and float32, the numbers
themselves differ: a float32 other than zero has bits that would be an id above eight million.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_patch.data.storage import FileArray, RandomAccessFile
from megatron_patch.errors import DataError

TYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""The types of token ids by the codes with which Megatron writes them."""
# (code, bytes of a token) -> the type in which the ids are read. No id needs the last bit of uint32 or uint64, for which Megatron's format
# has no codes.
_IDS = {(6, 2): "uint16", (7, 4): "int32"}
_WRITTEN = {(7, "int32"): "uint32", (8, "int64"): "uint64"}
_FLOATS = {(6, 4): "float32, as GPT-NeoX writes it", (6, 8): "float64, as Megatron writes it", (7, 8): "float64, as GPT-NeoX writes it"}
_DISPUTED = {
    6: "uint16 where DeepSpeed wrote it, float64 or float32 where Megatron or GPT-NeoX did",
    7: "uint32 where DeepSpeed wrote it, float32 or float64 where Megatron or GPT-NeoX did",
}
_SMALLEST_FLOAT = 0x00800000
_CHUNK = 1 << 20
_SPAN = 4096


def token_dtype(code: int, lengths: FileArray, pointers: FileArray, tokens: RandomAccessFile, index: str) -> np.dtype[np.generic]:
    """Returns the type of a dataset's tokens.

    Args:
        code: the code in the header of the index.
        lengths: number of tokens of each sequence.
        pointers: first byte of each sequence.
        tokens: the file of the tokens.
        index: path of the index, for messages.

    Raises:
        DataError: the code is unknown, the tokens are no whole numbers, or nothing tells what they are.
    """
    if code in TYPES and code != 8:
        return np.dtype(TYPES[code])
    if code != 8 and code not in _DISPUTED:
        raise _refused(f"{index} has dtype code {code}, which no known writer uses")
    size = _token_bytes(lengths, pointers, tokens.size)
    if code == 8:
        # What fits neither type is a damaged index of the usual one, whose error says more.
        return np.dtype("int64" if size == 8 else "uint16")
    if size is None:
        raise DataError(
            f"{index} has dtype code {code} ({_DISPUTED[code]}), and no sequence has a token by which to tell them apart",
            "at least one token in a dataset with this code",
            "leave out this dataset, which is empty",
        )
    if (code, size) in _FLOATS:
        raise _refused(f"{index} has dtype code {code} and {size} bytes for each token: {_FLOATS[code, size]}")
    if (code, size) not in _IDS:
        raise _refused(f"{index} has dtype code {code} ({_DISPUTED[code]}), but its offsets and lengths give {size} bytes for each token")
    if code == 7 and _looks_like_floats(tokens):
        raise _refused(f"{index} has dtype code 7 and 4 bytes for each token, and the numbers are float32, as Megatron writes it")
    return np.dtype(_IDS[code, size])


def written_type(code: int, dtype: np.dtype[np.generic]) -> str:
    """Returns the name of the type that the writer of a dataset gave its tokens, which `token_dtype` may read as another of its size."""
    return _WRITTEN.get((code, str(dtype)), str(dtype))


def _refused(what: str) -> DataError:
    names = ", ".join(f"{code} {np.dtype(dtype)}" for code, dtype in sorted(TYPES.items()))
    return DataError(
        what,
        f"token ids, which are whole numbers: {names}; from DeepSpeed also 6 uint16, 7 uint32, 8 uint64",
        "give a dataset of token ids, or preprocess the data again",
    )


def _token_bytes(lengths: FileArray, pointers: FileArray, bin_bytes: int) -> int | None:
    """Returns the bytes of a token by a sequence that has some; 0 if it is no whole number; None if no sequence has tokens."""
    count = len(lengths)
    # One of the first or the last one, almost always.
    parts = [(0, _SPAN), (max(0, count - 1), count)]
    for start, end in itertools.chain(parts, ((start, start + _CHUNK) for start in range(_SPAN, count, _CHUNK))):
        found = np.flatnonzero(lengths[start:end])
        if found.size:
            first = start + int(found[0])
            after = int(pointers[first + 1]) if first + 1 < count else bin_bytes
            size, rest = divmod(after - int(pointers[first]), int(lengths[first]))
            return 0 if rest else size
    return None


def _looks_like_floats(tokens: RandomAccessFile) -> bool:
    count = min(_SPAN, tokens.size // 4)
    numbers = FileArray(tokens, np.uint32, 0, tokens.size // 4)
    return any(bool((numbers.read(start, count) >= _SMALLEST_FLOAT).any()) for start in (0, len(numbers) - count))
