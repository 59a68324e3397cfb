"""Which token ends a document and which one begins it.

In: the files next to a tokenizer.json, and the special tokens of its vocabulary. Out: their ids, or the reason why there is none.

Only a token that the tokenizer itself declares special is chosen. In ordinary vocabulary `</s>` is a piece of HTML, and would end documents
where a text contains it. The files are read as transformers reads them (`PreTrainedTokenizerBase._from_pretrained`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import TokenizerOptions
from megatron_patch.tokenizers.library_errors import LARGEST_ID
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import optional_file, read_json, reason

Role = Literal["eos", "bos"]
ROLES: tuple[Role, Role] = ("eos", "bos")
FLAGS: dict[Role, str] = {"eos": "--eod-token", "bos": "--bos-token"}
USUAL_NAMES: dict[Role, tuple[str, ...]] = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
}
"""The names by which a special token is recognized where no file says what it is for."""
_SHORT_NUMBER = re.compile("[0-9]{1,10}")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS_OF_A_TOKEN = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Choice:
    """The special token of a role.

    Args:
        token: its id, or None.
        reason: why there is none; "" where there is one.
    """

    token: int | None
    reason: str = ""


@dataclass
class SpecialTokenFiles:
    """What the files next to a tokenizer.json say about special tokens.

    Args:
        path: the file that says it, for messages.
        names: the token of each role that the files name ("eos_token" and so on), None where they say that there is none.
        added: tokens with ids that may be missing in the tokenizer.json: id to content and flags.
        added_path: the file that names them.
        lists_all: whether that file is tokenizer_config.json, which then lists all added tokens, also those of tokenizer.json.
        more: the contents and flags of other special tokens, without ids.
        split: whether special tokens inside of texts are split like other text.
    """

    path: str = ""
    names: dict[str, str | None] = field(default_factory=dict)
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    added_path: str = ""
    lists_all: bool = False
    more: list[dict[str, Any]] = field(default_factory=list)
    split: bool = False


def read_special_token_files(folder: Path) -> SpecialTokenFiles:
    """Reads tokenizer_config.json and, where it has no `added_tokens_decoder`, special_tokens_map.json and added_tokens.json.

    Raises:
        DataError: a file cannot be read, or holds something else than transformers writes.
    """
    path, map_path, added_path = (folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens"))
    config = _read(path)
    legacy = "added_tokens_decoder" not in config
    entries = {**config, **(_read(map_path) if legacy else {})}
    found = SpecialTokenFiles(str(path if path.exists() else map_path), split=config.get("split_special_tokens") is True)
    for key in _NAMED:
        if key in entries:
            found.names[key] = None if entries[key] is None else _token(entries[key], path)["content"]
    if legacy:
        # As transformers does it: additional_special_tokens do not count here if there is an object of extra_special_tokens.
        extra = [] if isinstance(entries.get("extra_special_tokens") or [], Mapping) else _extra_tokens(entries, path)
        special = {*found.names.values(), *(_token(value, path)["content"] for value in extra)}
        found.added_path = str(added_path)
        for content, number in _read(added_path).items():
            flags = {"normalized": content not in special, "special": content in special}
            found.added[_id(number, added_path)] = {"content": _text(content, added_path), **flags}
    else:
        found.added_path, found.lists_all = str(path), True
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, Mapping):
            raise DataError(f"{path}: added_tokens_decoder is {shortened(repr(decoder))}", "an object of ids and tokens", "repair the file")
        for number, token in decoder.items():
            if not isinstance(token, Mapping):
                raise DataError(
                    f"{path}: added_tokens_decoder holds {number}: {shortened(repr(token))}",
                    "ids with an object of content and flags",
                    "repair the file",
                )
            found.added[_id(int(number) if _SHORT_NUMBER.fullmatch(number) else number, path)] = _token(token, path)
    found.more = [_token(value, path) for value in _special_values(entries, path)]
    return found


def _special_values(entries: Mapping[str, Any], path: Path) -> list[Any]:
    """Returns the values of all special tokens that the files name, in the order in which transformers adds them."""
    values = [entries[key] for key in _NAMED if entries.get(key) is not None]
    for key, value in entries.items():
        # transformers takes a model's own token from a text, or from an object that says that it is a token.
        if key.endswith("_token") and key not in _NAMED and (isinstance(value, str) or (isinstance(value, Mapping) and "__type" in value)):
            values.append(value)
    extra = entries.get("extra_special_tokens")
    return [*values, *(extra.values() if isinstance(extra, Mapping) else ()), *_extra_tokens(entries, path)]


def _extra_tokens(entries: Mapping[str, Any], path: Path) -> list[Any]:
    """Returns the special tokens without a role: those of extra_special_tokens, or else of additional_special_tokens, as it was called."""
    lists = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        given = entries.get(key) or []
        if not isinstance(given, list) and not (isinstance(given, Mapping) and key == "extra_special_tokens"):
            raise DataError(f"{path}: {key} is {shortened(repr(given))}", "a list of tokens", "repair the file")
        lists.append(given if isinstance(given, list) else [])
    return lists[0] or lists[1]


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; nothing where there is none. A link to nowhere, or a pipe, is an error."""
    try:
        if not optional_file(path):
            return {}
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}", "a JSON object", "repair or remove the file") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}", "a JSON object", "repair or remove the file")
    return content


def _token(value: Any, path: Path) -> dict[str, Any]:
    """Returns content and flags of a token that a file gives as a string or as an object."""
    if isinstance(value, str):
        return {"content": _text(value, path), "normalized": False, "special": True}
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {key: bool(value[key]) for key in _FLAGS_OF_A_TOKEN if key in value}
        return {"content": _text(value["content"], path), "special": "__type" in value or "special" not in value, **flags}
    raise DataError(f"{path}: a special token is {shortened(repr(value))}", "a text, or an object with the key content", "repair the file")


def _id(value: Any, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_ID:
        raise DataError(f"{path}: a token has the id {shortened(repr(value))}", f"whole numbers from 0 to {LARGEST_ID}", "repair the file")
    return value


def _text(value: str, path: Path) -> str:
    if not value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{path}: a token is {shortened(repr(value))}", "text that is not empty and is valid Unicode", "repair the file")
    return value


def given_token(role: Role, options: TokenizerOptions) -> tuple[int | None, str | None]:
    """Returns the id that is known already and the name that the user gave for a role, each None if there is none."""
    return (options.eod_id, options.eod_token) if role == "eos" else (options.bos_id, options.bos_token)


def choose(role: Role, options: TokenizerOptions, files: SpecialTokenFiles, ids: Mapping[str, int], special: Collection[str]) -> Choice:
    """Returns the token that ends (role "eos") or begins (role "bos") a document.

    Args:
        role: which one.
        options: may have its id, or the name that the user gave.
        files: what the tokenizer's files say.
        ids: the id of each token of the vocabulary.
        special: the tokens that the tokenizer declares special.

    Raises:
        DataError: the token given, or the one that the files name, is not in the vocabulary.
    """
    flag, key = FLAGS[role], f"{role}_token"
    known, given = given_token(role, options)
    if known is not None:
        return Choice(known)
    if given is not None:
        if given not in ids:
            allowed = f"a token of the vocabulary{_listed(special)}"
            raise DataError(f"{flag} {given} is not in the vocabulary", allowed, "check its spelling")
        return Choice(ids[given])
    if key in files.names:
        name = files.names[key]
        if name is None:
            return Choice(None, f"{files.path} says {key}: null")
        if name not in ids:
            raise DataError(
                f"{files.path} names {name} as {key}, but the vocabulary has no such token",
                f"a token of the vocabulary{_listed(special)}",
                f"repair the tokenizer's files, or name the token with {flag}",
            )
        return Choice(ids[name])
    found = [name for name in USUAL_NAMES[role] if name in special]
    if len(found) == 1:
        return Choice(ids[found[0]])
    if found:
        return Choice(None, f"several of its special tokens may be meant: {', '.join(found)}")
    return Choice(None, "none of its special tokens has a usual name")


def _listed(special: Collection[str]) -> str:
    """Returns the first few special tokens for a message."""
    if not special:
        return ""
    first = sorted(special, key=lambda name: (len(name), name))[:8]
    return f"; special are {', '.join(first)}{' and others' if len(special) > len(first) else ''}"
