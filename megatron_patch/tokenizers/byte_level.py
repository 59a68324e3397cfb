"""The letters that stand for bytes in byte-level BPE vocabularies (GPT-2's table). In: nothing. Out: 256 letters, by byte."""

from __future__ import annotations


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it is a visible character of Latin-1."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
