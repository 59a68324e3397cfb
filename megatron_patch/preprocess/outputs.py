"""The names of a run's outputs, and whether they can be written. In: --output-prefix and --json-keys. Out: dataset prefixes."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.errors import DataError
from megatron_patch.utils.files import make_folder

_NOT_IN_NAMES = re.compile(r"[./\0]")  # a key never leads to another folder
_LONGEST_SUFFIX = ".unordered.lengths.partial"


def output_prefixes(prefix: str, keys: Sequence[str]) -> list[str]:
    """Returns PREFIX_KEY_document for each key, as Megatron names them; dots and slashes of keys become underscores.

    Raises:
        DataError: two keys have the same output.
    """
    outputs: dict[str, str] = {}
    for key in keys:
        output = f"{prefix}_{_NOT_IN_NAMES.sub('_', key)}_document"
        if output in outputs:
            raise DataError(
                f"--json-keys {outputs[output]} and {key} would both write {output}",
                "keys that are different, also with underscores for dots and slashes",
                "remove one of them, and preprocess it with another --output-prefix",
            )
        outputs[output] = key
    return list(outputs)


def make_output_folder(prefix: str, outputs: Sequence[str]) -> None:
    """Creates the folder of the outputs, and checks that files can be created there.

    Args:
        prefix: --output-prefix, for messages.
        outputs: what `output_prefixes` returned for it.

    Raises:
        DataError: the folder cannot be created or written, or a name is too long.
    """
    try:
        folder = Path(f"{prefix}_").parent
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for output in outputs:
            with contextlib.suppress(FileNotFoundError):
                os.stat(f"{output}{_LONGEST_SUFFIX}")
    except OSError as error:
        reason = "not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror or str(error)
        raise DataError(
            f"--output-prefix {prefix} cannot be created: {error.filename or prefix}: {reason}",
            "a prefix of files in a writable folder, which is created if it does not exist",
            "choose another --output-prefix, or correct the folder and its permissions",
        ) from error
