"""A keyed pseudo-random permutation of 0..n-1 in constant memory: the order of blocks without an index.

In: n and a key. Out: the permuted number of any position, and the inverse. A Feistel network permutes the numbers below the next power of
two. A result outside 0..n-1 is permuted again until it is inside (cycle walking), which takes less than two passes on average.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 8


def derive_key(*parts: object) -> int:
    """Returns a 64-bit key that depends on all parts, which may be anything printable: a seed, an epoch, a name."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Returns a bijective 64-bit mix of each value with a key: two rounds of multiplying and folding."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(29))


class Permutation:
    """A permutation of 0..n-1.

    Args:
        n: number of elements, from 1 to 2^62.
        key: selects the permutation.

    Raises:
        ValueError: n is out of range.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} numbers; allowed: 1 to 2^62")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(derive_key(key, number)) for number in range(_ROUNDS)]

    def _pass(self, values: npt.NDArray[np.uint64], inverse: bool) -> npt.NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> self._low_bits
        rounds = range(_ROUNDS - 1, -1, -1) if inverse else range(_ROUNDS)
        for number in rounds:
            if number % 2 == 0:
                high = high ^ (_mix(low, self._keys[number]) & self._high_mask)
            else:
                low = low ^ (_mix(high, self._keys[number]) & self._low_mask)
        return (high << self._low_bits) | low

    def _walk(self, positions: npt.NDArray[np.int64], inverse: bool) -> npt.NDArray[np.int64]:
        if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= self.n):
            raise IndexError(f"positions {int(positions.min())} to {int(positions.max())} in a permutation of {self.n}")
        if self.n == 1:
            return np.zeros_like(positions)
        values = self._pass(positions.astype(np.uint64), inverse)
        outside = values >= np.uint64(self.n)
        while outside.any():
            values[outside] = self._pass(values[outside], inverse)
            outside = values >= np.uint64(self.n)
        return values.astype(np.int64)

    def many(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the permuted numbers of positions, int64 [N] to int64 [N]."""
        return self._walk(np.asarray(positions, dtype=np.int64), inverse=False)

    def inverse(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the positions of permuted numbers, int64 [N] to int64 [N]."""
        return self._walk(np.asarray(numbers, dtype=np.int64), inverse=True)

    def __call__(self, position: int) -> int:
        """Returns the permuted number of one position."""
        return int(self.many(np.array([position]))[0])
