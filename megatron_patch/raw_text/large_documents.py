"""Documents that are too large to hold in memory several times: a .txt file that is one document is read piece by piece.

In: an open text file. Out: `LargeText`, whose pieces are decoded one at a time. Compared with reading a text of 200 MB as one string, this
divides the peak memory of preprocessing by 2.4 for Llama-3, 2.6 for Qwen3 and 6.1 for Mistral's SentencePiece model
(benchmarks/results/preprocess_large-cpu-2026-11-30.json). JSON lines, tables and compressed files hold no documents of this size in
practice, and are read in one piece.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

LARGE_BYTES = 1 << 25
MOST_DOCUMENT_BYTES = 1 << 30
"""Largest document that is held in memory: a line, a row, or the text between two separators or of a compressed file."""
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class LargeText:
    """The text of a file, which is not read yet.

    Args:
        file: the file, open for reading.
        size: bytes of the text.
        begin: its first byte in the file.
    """

    file: BinaryIO
    size: int
    begin: int = 0

    def pieces(self) -> Iterator[str]:
        """Yields the text, a few megabytes at a time.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
            OSError: the file cannot be read.
            EOFError: the file has become shorter.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, self.size, _PIECE_BYTES):
            count = min(_PIECE_BYTES, self.size - start)
            data = os.pread(self.file.fileno(), count, self.begin + start)
            if len(data) < count:
                raise EOFError("the file has become shorter")
            yield decoder.decode(data, final=start + count == self.size)


def load_text(text: str | LargeText) -> str:
    """Returns a text as one string.

    Raises:
        UnicodeDecodeError, OSError, EOFError: as `LargeText.pieces`.
    """
    return text if isinstance(text, str) else "".join(text.pieces())
