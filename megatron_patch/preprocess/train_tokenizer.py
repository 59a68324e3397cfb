"""A small byte-level BPE from text, for corpora without a tokenizer of their own. In: input files. Out: a folder with tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_patch.errors import DataError
from megatron_patch.raw_text.inputs import Span, expand
from megatron_patch.raw_text.large_documents import whole
from megatron_patch.raw_text.parse_documents import documents
from megatron_patch.raw_text.readers import batches

EOD_TOKEN = "<|endoftext|>"


def _texts(inputs: Sequence[str], key: str, max_bytes: int) -> Iterator[str]:
    """Documents up to so many bytes; lines that are no documents are left to the preprocessor to report."""
    left = max_bytes
    for batch in batches([Span(file) for file in expand(inputs)], (key,)):
        for document in documents(batch, (key,), []):
            if left <= 0:
                return
            if document.texts and document.texts[0]:
                text = whole(document.texts[0])
                left -= len(text.encode("utf-8", "ignore"))
                yield text


def train_tokenizer(inputs: Sequence[str], output: str, vocab_size: int, key: str = "text", max_bytes: int = 200_000_000) -> Path:
    """Trains a byte-level BPE; the same text gives the same tokenizer.

    Args:
        inputs: files, globs, or "-".
        output: a folder.
        vocab_size: ids, with the 256 bytes and the end-of-document token.
        key: JSON key of the text.
        max_bytes: how much text to read.

    Returns:
        The path of tokenizer.json.

    Raises:
        DataError: no text, or a vocabulary that is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size}", "257 and more: 256 bytes and the end-of-document token")
    texts = _texts(inputs, key, max_bytes)
    first = next(texts, None)
    if first is None:
        raise DataError(f"no text under the key {key!r} in {' '.join(inputs)}", "documents with text", "check --input and --json-key")

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
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        # Last, and under its name when it is whole: who finds it may use it.
        backend.save(str(folder / "tokenizer.json.partial"))
        os.replace(folder / "tokenizer.json.partial", folder / "tokenizer.json")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}", "a writable folder") from error
    return folder / "tokenizer.json"
