"""Which token ends a document and which one begins it.

In: the files beside a tokenizer.json, and the special tokens of its vocabulary. Out: their ids, or the reason why there is none.

Only a token that the tokenizer itself declares special is chosen. In ordinary vocabulary `</s>` is a piece of HTML, and would end documents
where a text contains it. The files are read as transformers reads them (`PreTrainedTokenizerBase._from_pretrained`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_patch.errors import DataError
from megatron_patch.utils.files import optional_file, read_json, reason

Role = Literal["eos", "bos"]
FLAGS: dict[Role, str] = {"eos": "--eod-token", "bos": "--bos-token"}
USUAL_NAMES: dict[Role, tuple[str, ...]] = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
}
"""The names by which a special token is recognized where no file says what it is for."""
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
    """What the files beside a tokenizer.json say about special tokens.

    Args:
        path: the file that says it, for messages.
        names: the token of each role that the files name ("eos_token" and so on), None where they say that there is none.
        added: tokens with ids that may be missing in the tokenizer.json: id to content and flags.
        more: the contents and flags of other special tokens, without ids.
    """

    path: str = ""
    names: dict[str, str | None] = field(default_factory=dict)
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    more: list[dict[str, Any]] = field(default_factory=list)


def read_special_token_files(folder: Path) -> SpecialTokenFiles:
    """Reads tokenizer_config.json and, where it has no `added_tokens_decoder`, special_tokens_map.json and added_tokens.json.

    Raises:
        DataError: a file cannot be read, or holds something else than transformers writes.
    """
    path = folder / "tokenizer_config.json"
    config = _read(path)
    legacy = "added_tokens_decoder" not in config
    entries = {**config, **(_read(folder / "special_tokens_map.json") if legacy else {})}
    found = SpecialTokenFiles(str(path if path.is_file() else folder / "special_tokens_map.json"))
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if not isinstance(token, Mapping) or not str(number).isdigit():
            raise DataError(
                f"{path}: added_tokens_decoder holds {number}: {token!r}", "ids with an object of content and flags", "repair the file"
            )
        found.added[int(number)] = _token(token, path)
    for key in _NAMED:
        if key in entries:
            found.names[key] = None if entries[key] is None else _token(entries[key], path)["content"]
    if legacy:
        special = {name for name in found.names.values() if name}
        for content, number in _read(folder / "added_tokens.json").items():
            is_special = content in special
            found.added[int(number)] = {"content": content, "normalized": not is_special, "special": is_special}
    found.more = [_token(value, path) for value in _special_values(entries)]
    return found


def _special_values(entries: Mapping[str, Any]) -> list[Any]:
    """Returns the values of all special tokens that the files name, in the order in which transformers adds them."""
    values = [entries[key] for key in _NAMED if entries.get(key) is not None]
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or []
    values += [value for key, value in entries.items() if key.endswith("_token") and key not in _NAMED and isinstance(value, (str, dict))]
    return [*values, *(extra.values() if isinstance(extra, Mapping) else extra)]


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; nothing where there is no such file."""
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
        return {"content": value, "normalized": False, "special": True}
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {key: bool(value[key]) for key in _FLAGS_OF_A_TOKEN if key in value}
        return {"content": value["content"], "special": "__type" in value or "special" not in value, **flags}
    raise DataError(f"{path}: a special token is {value!r}", "a text, or an object with the key content", "repair the file")


def choose(
    role: Role,
    given: str | None,
    files: SpecialTokenFiles,
    ids: Mapping[str, int],
    special: Collection[str],
    usual: Sequence[str] | None = None,
) -> Choice:
    """Returns the token that ends (role "eos") or begins (role "bos") a document.

    Args:
        role: which one.
        given: the name that the user gave, or None.
        files: what the tokenizer's files say.
        ids: the id of each token of the vocabulary.
        special: the tokens that the tokenizer declares special.
        usual: names to look for where the files do not name one; `USUAL_NAMES` by default.

    Raises:
        DataError: the token given, or the one that the files name, is not in the vocabulary.
    """
    flag, key = FLAGS[role], f"{role}_token"
    if given is not None:
        if given not in ids:
            raise DataError(
                f"{flag} {given} is not in the vocabulary", f"a token of the vocabulary{_listed(special)}", "check its spelling"
            )
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
    found = [name for name in (USUAL_NAMES[role] if usual is None else usual) if name in special]
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
