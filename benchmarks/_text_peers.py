"""Converts text to a dataset in the way of Megatron's tool, as a program that can be timed from start to end.

Worker processes encode with the tokenizer's library and return lists of ids to one writer, which writes each document as an array.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

_encode: Callable[[str], list[int]]
_encode_many: Callable[[list[str]], list[list[int]]]
_eod = 0


def _set_up(kind: str, model: str, eod: int) -> None:
    """Sets up a worker: loads the tokenizer as two functions."""
    global _encode, _encode_many, _eod
    _eod = eod
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        _encode, _encode_many = processor.encode, processor.encode
    else:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(model)
        _encode = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731
        _encode_many = lambda texts: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: E731


def _one_document(line: str) -> tuple[list[int], int]:
    return [*_encode(json.loads(line)["text"]), _eod], len(line)


def _many_documents(lines: list[str]) -> list[tuple[list[int], int]]:
    rows = _encode_many([json.loads(line)["text"] for line in lines])
    return [([*row, _eod], len(line)) for row, line in zip(rows, lines, strict=True)]


def _chunks(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def main(argv: Sequence[str]) -> None:
    """Writes a dataset.

    Args:
        argv: "each" or "batches" (documents per call of the library), corpus, output, type and model of the tokenizer, end-of-document id,
            vocabulary size, number of processes.
    """
    style, corpus, output, kind, model, eod, vocab, workers = argv
    dtype = np.uint16 if int(vocab) < 65500 else np.int32
    lengths: list[int] = []
    with (
        multiprocessing.Pool(int(workers), initializer=_set_up, initargs=(kind, model, int(eod))) as pool,
        open(corpus, encoding="utf-8") as lines,
        open(f"{output}_text_document.bin", "wb") as tokens,
    ):
        if style == "each":
            rows: Iterator[tuple[list[int], int]] = pool.imap(_one_document, lines, 32)
        else:
            rows = (row for rows in pool.imap(_many_documents, _chunks(lines, 32), 1) for row in rows)
        for ids, _ in rows:
            tokens.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    with open(f"{output}_text_document.idx", "wb") as index:
        sizes = np.array(lengths, dtype=np.int32)
        ends = np.cumsum(sizes.astype(np.int64) * np.dtype(dtype).itemsize)
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8 if dtype is np.uint16 else 4, len(lengths), len(lengths) + 1))
        index.write(sizes.tobytes() + np.concatenate(([0], ends[:-1])).tobytes() + np.arange(len(lengths) + 1).tobytes())


if __name__ == "__main__":
    main(sys.argv[1:])
