"""The letters that stand for bytes in byte-level BPE vocabularies (GPT-2's table). In: nothing. Out: 256 letters, one for each byte."""

from __future__ import annotations


def byte_letters() -> list[str]:
    """Returns the letter for each byte: the byte's own character where Latin-1 shows one, else the next from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
