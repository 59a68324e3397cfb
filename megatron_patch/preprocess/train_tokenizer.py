"""Trains a small byte-level BPE tokenizer. In: text files. Out: a folder with tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.errors import DataError
from megatron_patch.raw_text.inputs import FileRange, expand
from megatron_patch.raw_text.large_documents import load_text
from megatron_patch.raw_text.parse_documents import iterate_documents
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.utils.files import write_durably
from megatron_patch.utils.units import plural

EOD_TOKEN = "<|endoftext|>"
_MOST_IDS = 1 << 24  # the library reserves memory for all of them at once


@dataclass
class _Read:
    """What was read: bytes, lines that are not blank, lines that are bad, and the first bad one with its reason."""

    bytes: int = 0
    documents: int = 0
    bad: int = 0
    first_bad: str = ""


def _texts(inputs: Sequence[str], key: str, max_bytes: int, read: _Read) -> Iterator[str]:
    """Yields documents up to a number of bytes. Bad lines are skipped and counted in `read`."""
    left, file, line = max_bytes, -1, 0
    for batch in read_batches([FileRange(file) for file in expand(inputs)], (key,)):
        file, line = batch.file, line if batch.file == file else 0
        read.bytes += batch.size
        counts: list[int] = []
        for document in iterate_documents(batch, (key,), counts):
            if left <= 0:
                return
            read.documents += 1
            if document.texts is None:
                read.bad += 1
                read.first_bad = read.first_bad or f"{batch.source}, line {line + document.number}: {document.reason}"
            elif document.texts[0]:
                text = load_text(document.texts[0])
                left -= len(text.encode("utf-8", "ignore"))
                yield text
        line += counts[0]


def _no_text(inputs: Sequence[str], key: str, read: _Read) -> DataError:
    if not read.documents:
        return DataError(
            f"{' '.join(inputs)} " + ("has nothing but blank lines or a byte-order mark" if read.bytes else "is empty"),
            "documents with text",
            "check --input",
        )
    return DataError(
        f"{' '.join(inputs)} has no text under the key {key!r}: {plural(read.bad, 'bad line')}, "
        + plural(read.documents - read.bad, "empty document")
        + (f"; the first bad line is {read.first_bad}" if read.first_bad else ""),
        "documents with text",
        "check --input and --json-key",
    )


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    key: str = "text",
    max_bytes: int = 200_000_000,
    notice: Callable[[str], None] = lambda text: None,
) -> Path:
    """Trains a byte-level BPE. The same text always gives the same tokenizer.

    Args:
        inputs: files, globs, or "-".
        output: the folder to write to.
        vocab_size: number of ids, which include the 256 bytes and the end-of-document token.
        key: JSON key of the text.
        max_bytes: largest number of bytes of text to read.
        notice: receives messages for the user.

    Returns:
        The path of tokenizer.json.

    Raises:
        DataError: there is no text, the vocabulary is too small, or the folder cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= _MOST_IDS:
        raise DataError(
            f"--vocab-size {vocab_size} is too {'small' if vocab_size < 257 else 'large'}",
            f"from 257, for the 256 bytes and the end-of-document token, to {_MOST_IDS:,}",
            "give another number of ids",
        )
    read = _Read()
    texts = _texts(inputs, key, max_bytes, read)
    first = next(texts, None)
    if first is None:
        raise _no_text(inputs, key, read)

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD_TOKEN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(all_texts(), trainer)
    if 2 * read.bad > read.documents:
        notice(f"warning: {read.bad:,} of {plural(read.documents, 'line')} are bad and left out; the first is {read.first_bad}")
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        notice(
            f"the vocabulary has {plural(reached, 'id')}, not {vocab_size:,}: the text has no more pairs of tokens to merge; "
            "give more text for a larger vocabulary"
        )
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOD_TOKEN,
            "bos_token": EOD_TOKEN,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_durably(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
        # Written last and renamed when it is complete, so that a tokenizer.json that exists can be used.
        write_durably(folder / "tokenizer.json", backend.to_str(pretty=True))
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}", "a writable folder") from error
    return folder / "tokenizer.json"
