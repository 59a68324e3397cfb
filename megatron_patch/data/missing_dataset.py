"""Says what is wrong with the name of a dataset that does not exist, and which dataset was probably meant.

In: a word of --data-path. Out: an error with the prefixes that exist at this place, or None if the dataset exists.
"""

from __future__ import annotations

import difflib
import glob
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.data.storage import exists, is_address
from megatron_patch.errors import DataError
from megatron_patch.raw_text.inputs import COMPRESSED_SUFFIXES, LINE_SUFFIXES, inner_suffix
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.text import shortened

_ALLOWED = "a dataset prefix: the path without .bin and .idx, which is --output-prefix of preprocessing and _text_document"
_SHOWN, _MOST_ENTRIES = 8, 100_000


def missing_dataset(word: str, flag: str) -> DataError | None:
    """Returns what is wrong with a word that names no dataset; None if all that it names exist.

    Of an address, only the first dataset is asked for: each question takes a round trip.

    Args:
        word: a prefix, a glob or @FILE, as `expand_prefixes` takes them.
        flag: where it is from, for the message, such as --data-path.
    """
    try:
        prefixes: Sequence[str] = expand_prefixes(word)
        if glob.has_magic(word) and not word.startswith("@"):
            return None  # the matches of a glob exist
        if is_address(prefixes[0]):
            prefixes = prefixes[:1]
        missing = next((prefix for prefix in prefixes if not exists(f"{prefix}.idx") and not exists(f"{prefix}.bin")), None)
        error = no_dataset(missing) if missing is not None else None
    except DataError as found:
        error = found
        if is_local_glob(word):
            error = DataError(found.what, found.allowed, _nearest(word) or found.do)
    if error is None:
        return None
    return DataError(f"{flag}: {error.what}", error.allowed, error.do)


def is_local_glob(word: str) -> bool:
    """Returns whether a word is a glob over datasets of this machine, unless a dataset has that name."""
    return glob.has_magic(word) and not word.startswith("@") and not is_address(word)


def missing_datasets(words: Iterable[tuple[str, str]]) -> list[DataError]:
    """Returns what is wrong with each (flag, word) that names no dataset; the words as `missing_dataset` takes them."""
    return [error for flag, word in words if (error := missing_dataset(word, flag)) is not None]


def check_datasets(words: Iterable[tuple[str, str]]) -> None:
    """Checks that all datasets of a run exist.

    Raises:
        DataError: one does not; the message names all of them.
    """
    errors = missing_datasets(words)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError("\n".join(error.what for error in errors), _ALLOWED, "\n".join(str(error.do) for error in errors))


def no_dataset(prefix: str) -> DataError:
    """Returns the error for a prefix of which neither PREFIX.bin nor PREFIX.idx exists."""
    what = f"{shortened(prefix)}.bin does not exist"
    if is_address(prefix):
        return DataError(what, _ALLOWED, "check the address")
    if os.path.isdir(prefix):
        return DataError(f"{shortened(prefix)} is a folder, not a dataset", _ALLOWED, _in_folder(prefix))
    if os.path.isfile(prefix):
        return DataError(f"{shortened(prefix)} is a file, not a dataset", _ALLOWED, _of_file(prefix))
    folder = os.path.dirname(prefix)
    if folder and not os.path.isdir(folder):
        what += f", because the folder {shortened(folder)} does not exist"
    check = "check the path" if os.path.isabs(prefix) else f"check the path, which begins at {os.getcwd()}"
    return DataError(what, _ALLOWED, _nearest(prefix) or check)


def _datasets(folder: str) -> list[str]:
    """Returns the names of the datasets in a folder, sorted."""
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return []
    return sorted(name.removesuffix(".idx") for name in names if name.endswith(".idx"))


def _nearest(prefix: str) -> str | None:
    """Returns what to give in place of a prefix or glob; None if nothing is near."""
    folder, name = os.path.split(prefix)
    if folder and not os.path.isdir(folder):
        above, last = os.path.split(folder)
        near = suggestion(last, _folders(above), prefix=os.path.join(above, "")) if not above or os.path.isdir(above) else None
        return near.replace("did you mean", "did you mean the folder") if near else None
    found = _datasets(folder)
    at = os.path.join(folder, "")
    # What --output-prefix was given: preprocessing appends the key and "_document".
    if longer := [one for one in found if one.startswith(f"{name}_")]:
        return f"did you mean {' or '.join(map(shlex.quote, (at + one for one in longer[:3])))}?"
    if near := suggestion(name, found, prefix=at):
        return near
    prefixes = {one.removesuffix("_document").rpartition("_")[0]: one for one in found if one.endswith("_document")}
    if close := difflib.get_close_matches(name, prefixes, n=1):
        return f"did you mean {shlex.quote(at + prefixes[close[0]])}?"
    return f"the datasets there: {_listing(at + one for one in found)}" if found else None


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return [entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False) if entry.is_dir()]
    except OSError:
        return []


def _in_folder(folder: str) -> str:
    """Returns what to give in place of a folder."""
    at = os.path.join(folder, "")
    found = _datasets(folder)
    if not found:
        return "give a dataset; this folder has none"
    if len(found) == 1:
        return f"give {shlex.quote(at + found[0])}"
    return f"give one of its datasets ({_listing(at + one for one in found)}), or all as one corpus: {shlex.quote(at + '*')}"


def _of_file(path: str) -> str:
    """Returns what to give in place of a file."""
    if path.endswith(".json") and exists(f"{path.removesuffix('.json')}.idx"):
        return f"give the prefix: {shlex.quote(path.removesuffix('.json'))}"
    if inner_suffix(path) not in (*LINE_SUFFIXES, ".txt", ".parquet"):
        return "give the prefix of a dataset"
    folder, name = os.path.split(path)
    stem = Path(name).with_suffix("") if Path(name).suffix in COMPRESSED_SUFFIXES else Path(name)
    stem = stem.with_suffix("")
    made = [one for one in _datasets(folder) if one.startswith(f"{stem}_")]
    if made:
        return f"give the dataset that was made of it: {' or '.join(shlex.quote(os.path.join(folder, one)) for one in made[:3])}"
    output = os.path.join(folder, str(stem))
    files = f"--input {shlex.quote(path)} --output-prefix {shlex.quote(output)}"
    return f"convert it: python tools/preprocess_data.py {files} --tokenizer-type …"


def _listing(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(map(shlex.quote, found[:_SHOWN])) + (f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else "")
