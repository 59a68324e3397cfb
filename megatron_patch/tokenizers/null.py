"""Text that consists of token ids already. In: the size of the vocabulary. Out: a tokenizer; for tests, and for data encoded elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import Flat, TokenizerOptions, flatten


@dataclass
class NullTokenizer:
    """Reads token ids with spaces between them, as "17 4 32"; the last id of the vocabulary ends a document."""

    vocab_size: int
    eod_id: int | None
    name: str = "NullTokenizer"
    bos_id: int | None = None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Returns the ids that are written in the texts.

        Raises:
            DataError: a word is not an id of the vocabulary.
        """
        try:
            rows = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            raise DataError(f"NullTokenizer: {error}", "whole numbers with spaces between them") from error
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.vocab_size:
                raise DataError(f"NullTokenizer: ids {min(row)} to {max(row)}", f"0 to {self.vocab_size - 1}")
        return flatten(rows)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the ids as text."""
        return " ".join(str(int(token)) for token in ids)


def load_null(options: TokenizerOptions) -> NullTokenizer:
    """Returns the tokenizer for a vocabulary size, which --tokenizer-model may give too.

    Raises:
        DataError: the size is missing or below 2.
    """
    vocab_size = options.vocab_size
    if vocab_size is None and options.model is not None and options.model.isdigit():
        vocab_size = int(options.model)
    if vocab_size is None or vocab_size < 2:
        raise DataError("NullTokenizer without the size of its vocabulary", "--vocab-size N, from 2", "give --vocab-size")
    return NullTokenizer(vocab_size, eod_id=vocab_size - 1)
