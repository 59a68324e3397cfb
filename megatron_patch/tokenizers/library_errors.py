"""Turns what a tokenizer's library raises into errors that name the tokenizer. In: any failure. Out: a DataError.

The libraries in Rust panic on some damaged files: pyo3's PanicException is no Exception, and would pass every ordinary handler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from megatron_patch.errors import DataError
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import reason

MOST_FILE_BYTES = 1 << 30
"""Most bytes of a tokenizer's file. Those of vocabularies with 262,144 tokens have 33 MB."""
LARGEST_ID = (1 << 31) - 2
"""Largest token id: the indexed datasets store ids as int32, and the size of the vocabulary is one more."""
Result = TypeVar("Result")


def is_library_failure(error: BaseException) -> bool:
    """Returns whether an error is one that a library may raise: any Exception, or a panic of a library in Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def failures_as(make: Callable[[BaseException], Exception]) -> Iterator[None]:
    """A context in which every failure of a library becomes another error. A DataError stays what it is.

    Args:
        make: returns the error to raise, given the failure.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise make(error) from error


def library_errors(what: str, allowed: str, do: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which every failure of a library becomes a DataError.

    Args:
        what: what failed, to which the library's own message is appended.
        allowed: what is allowed.
        do: what to do.
    """
    return failures_as(lambda error: DataError(f"{what}: {reason(error)}", allowed, do))


def encode_texts(name: str, call: Callable[[list[str]], Result], texts: Sequence[str]) -> Result:
    """Returns what a library returns for some texts.

    Args:
        name: name of the tokenizer, for the message.
        call: encodes a list of texts.
        texts: the texts.

    Raises:
        DataError: the library fails. The message quotes the first text for which it does.
    """

    def failure(error: BaseException) -> DataError:
        failing = next((text for text in texts if _fails(call, text)), "".join(texts))
        return DataError(
            f"{name} cannot encode {shortened(repr(failing))}: {reason(error)}",
            "a tokenizer that can encode any text",
            "repair its files (an unknown token, a pattern or a table that is missing or damaged), or give another --tokenizer-model",
        )

    with failures_as(failure):
        return call(list(texts))


def _fails(call: Callable[[list[str]], Result], text: str) -> bool:
    try:
        call([text])
    except BaseException as error:
        if not is_library_failure(error):
            raise
        return True
    return False
