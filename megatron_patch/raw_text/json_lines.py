"""Reads the texts of a line of JSON, and says why there are none.

In: a line and the wanted keys. Out: a text for each key, or the reason why the line is left out. Only the wanted keys are judged: whatever
Python's json module reads may stand under the others, such as NaN, half of a surrogate pair or a number of any length.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from megatron_patch.raw_text.encodings import BYTE_ORDER_MARK

_MISSING = object()
_LISTED_KEYS, _LISTED_CHARS = 20, 60
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_ARRAY = "the input is a JSON array, but each line must be an object: convert it with jq -c '.[]' FILE"
_SPREAD = "an object must be on one line: convert the input with jq -c . FILE"
_ZSTD = "zstd (.zst)"
_SKIPPED_FRAME = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f; pzstd begins files with such a frame
_SIGNATURES = {
    b"\x1f\x8b": "gzip (.gz)",
    b"BZh": "bzip2 (.bz2)",
    b"\xfd7zXZ\0": "xz (.xz)",
    b"\x28\xb5\x2f\xfd": _ZSTD,
    b"PAR1": "Parquet (.parquet)",
    b"PK\3\4": "a zip archive",
}
# Digits are not converted: Python limits their number, and no number is a text.
_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)


class KeyPath(NamedTuple):
    """A key, and each way to cut it at a dot, the longest first name first.

    Args:
        key: the whole key.
        cuts: first name, and the path of the rest.
    """

    key: str
    cuts: tuple[tuple[str, KeyPath], ...]


@functools.cache
def _key_path(key: str) -> KeyPath:
    names = key.split(".")
    return KeyPath(key, tuple((".".join(names[:n]), _key_path(".".join(names[n:]))) for n in range(len(names) - 1, 0, -1)))


def key_paths(keys: Sequence[str]) -> list[KeyPath]:
    """Returns the path of each key, which may have dots."""
    return [_key_path(key) for key in keys]


def texts_of_line(line: bytes | memoryview, paths: Sequence[KeyPath]) -> tuple[str, ...] | str | None:
    """Returns the texts of the wanted keys; or the reason why the line is left out; or None if it is blank."""
    strict = True
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        raw = bytes(line).removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():
            return None
        # Bytes that are not UTF-8 become halves of surrogate pairs, which are judged under the wanted keys only.
        text, strict = raw.decode("utf-8", "surrogateescape"), False
        try:
            document = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            return f"not valid JSON: {error.msg} (character {error.pos + 1})" + _hint(raw, text, error)
        except RecursionError:
            return "not valid JSON: nested too deeply"
    texts = []
    for path in paths:
        key, cuts = path
        value = document.get(key, _MISSING) if isinstance(document, dict) else _MISSING
        if value is _MISSING and cuts:
            value = _find(document, path)
        if not isinstance(value, str):
            return _no_text(document, key, value)
        if not strict and (reason := _not_unicode(value, bytes(line))):
            return f"key {key!r} {reason}"
        texts.append(value)
    return tuple(texts)


def _find(value: Any, path: KeyPath) -> Any:
    """Returns the value of a key, or _MISSING. A name may contain dots itself: of the names that exist, the longest counts first."""
    if not isinstance(value, dict):
        return _MISSING
    key, cuts = path
    found = value.get(key, _MISSING)
    if found is _MISSING:
        for name, rest in cuts:
            if name in value and (found := _find(value[name], rest)) is not _MISSING:
                break
    return found


def _no_text(document: Any, key: str, value: Any) -> str:
    """Returns the reason why there is no text under a key."""
    if isinstance(document, list):
        return f"{_KINDS[list]}, not an object; {_ARRAY}"
    if not isinstance(document, dict):
        return f"{_KINDS[type(document)]}, not an object"
    if value is not _MISSING:
        return f"key {key!r} is {_KINDS[type(value)]}, not a string"
    keys = [name for name, found in _leaves(document) if isinstance(found, str)]
    kind = "keys with text" if keys else "keys"
    keys = keys or [name for name, _ in _leaves(document)]
    return f"key {key!r} is missing; " + (f"the {kind} are {shown_names(keys)}" if keys else "the object is empty")


def shown_names(names: Iterable[str]) -> str:
    """Returns names as a list for a message. One that could be misread, such as an empty one or one with spaces, is in quotes."""

    def is_plain(name: str) -> bool:
        return name.isprintable() and any(map(str.isalnum, name)) and not set(name) & set(" ,'\"")

    return ", ".join(name if is_plain(name) else repr(name) for name in names)


def _leaves(document: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the first keys of an object, with dots for nested ones, and their values."""

    def walk(value: dict[str, Any], begin: str) -> Iterator[tuple[str, Any]]:
        for name, found in value.items():
            if isinstance(found, dict) and found and begin.count(".") < _LISTED_KEYS:
                yield from walk(found, f"{begin}{name}.")
            else:
                yield (begin + name)[:_LISTED_CHARS], found

    return list(itertools.islice(walk(document, ""), _LISTED_KEYS))


def _not_unicode(text: str, line: bytes) -> str:
    """Returns what is wrong with a string that has no encoding in UTF-8; "" if it has one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return "is not UTF-8"
        return "has half of a surrogate pair, which is no character"
    return ""


def _hint(raw: bytes, text: str, error: json.JSONDecodeError) -> str:
    """Returns what a line that is not valid JSON looks like, for the end of a sentence; "" if it looks like nothing known."""
    signature = next((words for begin, words in _SIGNATURES.items() if raw.startswith(begin)), None)
    if raw[1:4] == _SKIPPED_FRAME and 0x50 <= raw[0] <= 0x5F:
        signature = _ZSTD
    if signature is not None:
        return (
            f"; the input looks like {signature}: give the file that suffix" if "." in signature else f"; the input looks like {signature}"
        )
    before, after = text[: error.pos], text[error.pos :]
    if text.lstrip().startswith("[") or (error.msg == "Extra data" and after.strip() == ","):
        return f"; {_ARRAY}"
    if text.strip() == "{":
        return f"; {_SPREAD}"
    if error.msg == "Extra data" and before.endswith("\r"):
        return r"; lines end in carriage returns only: convert the input with tr '\r' '\n'"
    if error.msg == "Extra data" and after.startswith("{"):
        return "; it has several objects: convert the input with jq -c . FILE"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"; it is not UTF-8 (byte {bad.start + 1})"
    return ""
