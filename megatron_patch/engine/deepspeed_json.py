"""Reads and checks the JSON file of `--deepspeed_config`.

In: its path, and the ZeRO level of the flags. Out: `UserSettings`, which DeepSpeed accepts, and findings about everything else.

DeepSpeed ignores top-level keys that it does not know, checks some sections only when the engine is built, and others not at all. So each
key is checked here: sections with a class of DeepSpeed by that class, the others by the tables in `deepspeed_keys`. DeepSpeed is imported
only for a file that has such sections, because that takes as long as importing torch.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from megatron_patch.engine.accelerator import choose_accelerator
from megatron_patch.engine.deepspeed_keys import CLASSES, FIXED, PLAIN, REFUSED, VALUES, WITHOUT_EFFECT, Kind
from megatron_patch.errors import ConfigError
from megatron_patch.requirements import require
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import read_small, reason
from megatron_patch.utils.findings import Findings
from megatron_patch.utils.registry import suggestion

FLAG = "--deepspeed_config"
_MOST_BYTES = 1 << 22
_AUTO = "auto"


@dataclass(frozen=True)
class UserSettings:
    """What a checked file says.

    Args:
        values: the settings, without values of "auto" and without those that have no effect here.
        notes: what was left out.
    """

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys were repeated."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1}) if len(self) < len(names) else []


def read_user_settings(path: str | None, zero_level: int, findings: Findings) -> UserSettings:
    """Reads and checks a file.

    Args:
        path: the file; None: no settings.
        zero_level: the ZeRO level where the file sets none, on which the meaning of other keys depends.
        findings: where to add keys and values that DeepSpeed or this program does not accept; the result leaves them out.

    Raises:
        ConfigError: the file cannot be read, or DeepSpeed is not installed.
    """
    if path is None:
        return UserSettings({})
    checker = _Checker(findings, zero_level)
    values = checker.check(_read(path))
    return UserSettings(values, checker.notes())


def _read(path: str) -> _Object:
    try:
        data = json.loads(read_small(path, _MOST_BYTES, wait=True), object_pairs_hook=_Object)
    except OSError as error:
        raise ConfigError(f"{FLAG} {path}: {reason(error)}", "a readable JSON file", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{FLAG} {path} is not valid JSON: {error}", "a JSON object", "correct the file") from error
    if not isinstance(data, _Object):
        raise ConfigError(f"{FLAG} {path} contains {_named(data)}", "a JSON object", "correct the file")
    return data


def _named(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def as_json(value: Any) -> str:
    """Returns a value as it is written in the file, for messages."""
    return shortened(json.dumps(value, ensure_ascii=False), 80)


def import_section_class(section: str) -> Any:
    """Returns DeepSpeed's class for a section in `CLASSES`.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    require("deepspeed", FLAG)
    choose_accelerator()
    module, name = CLASSES[section]
    return getattr(importlib.import_module(module), name)


class _Checker:
    """Checks one file.

    Args:
        findings: where to add what is wrong.
        zero_level: see `read_user_settings`.
    """

    def __init__(self, findings: Findings, zero_level: int) -> None:
        self._findings, self._zero_level = findings, zero_level
        self._automatic: list[str] = []
        self._dropped: list[str] = []

    def notes(self) -> tuple[str, ...]:
        """Returns what was left out of the file."""
        notes = []
        if self._automatic:
            notes.append(f"\"auto\" in {FLAG} means the program's value, or DeepSpeed's default: {', '.join(self._automatic)}")
        if self._dropped:
            notes.append(f"{FLAG}: without effect here, and left out: {', '.join(self._dropped)}")
        return tuple(notes)

    def _add(self, path: str, problem: str, allowed: str, do: str) -> None:
        self._findings.add(f"{FLAG}: {path} {problem}", allowed, do)

    def check(self, data: _Object) -> dict[str, Any]:
        """Returns the settings that are left; wrong ones are added to the findings."""
        self._repeated_and_infinite(data)
        values: dict[str, Any] = {}
        known = {*PLAIN, *VALUES, *(section for section in CLASSES if "." not in section)}
        for key, value in data.items():
            if key in REFUSED:
                self._refused(key, value)
            elif key not in known:
                self._unknown("", key, [*known, *REFUSED])
            elif value == _AUTO:
                self._automatic.append(key)
            elif key in VALUES:
                self._take(values, key, key, VALUES[key], value)
            elif not isinstance(value, dict):
                self._add(key, f"is {as_json(value)}", "a JSON object", f"write {key} as an object, or remove it")
            elif key in CLASSES:
                values[key] = self._checked_by_deepspeed(key, value)
            else:
                values[key] = self._plain(key, value)
        return values

    def _repeated_and_infinite(self, data: _Object) -> None:
        """Adds repeated keys and numbers that are not finite, at every level."""
        for path, value in _walk(data):
            for key in getattr(value, "repeated", ()):
                self._add(_join(path, key), "is given twice", "each key once", "remove one of them")
            if _infinite(value):
                self._add(path, f"is {as_json(value)}", "finite numbers", f"correct {path}, or remove it")

    def _refused(self, path: str, value: Any) -> None:
        """Refuses a key, unless it is switched off."""
        if value is False or value is None or (isinstance(value, dict) and value.get("enabled") is False):
            self._dropped.append(path)
            return
        refusal = REFUSED[path]
        self._add(path, f"cannot be used: {refusal.why}", "the keys in docs/parallelism.md", refusal.do)

    def _unknown(self, section: str, key: str, known: list[str]) -> None:
        """Adds an unknown key, with the nearest name, or the place where the name belongs."""
        path = _join(section, key)
        home = next((other for other, keys in _homes().items() if key in keys and other != section), None)
        do = suggestion(key, [name for name in known if "." not in name])
        if home is not None and (do is None or section == ""):
            do = f"move it into {home}" if home else "move it out of the section, to the top level of the file"
        allowed = ", ".join(sorted(known)) if section and len(known) <= 12 else f"keys of {section or 'the file'} that DeepSpeed knows"
        self._add(path, "is not a key that DeepSpeed knows", allowed, do or "remove it")

    def _plain(self, section: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of a section that DeepSpeed reads without a check."""
        values: dict[str, Any] = {}
        known = [*PLAIN[section], *(path.partition(".")[2] for path in CLASSES if path.startswith(f"{section}."))]
        for key, value in data.items():
            path = _join(section, key)
            if path in REFUSED:
                self._refused(path, value)
            elif key not in known:
                self._unknown(section, key, known)
            elif value == _AUTO:
                self._automatic.append(path)
            elif path in CLASSES:
                if isinstance(value, dict):
                    values[key] = self._checked_by_deepspeed(path, value)
                else:
                    self._add(path, f"is {as_json(value)}", "a JSON object", f"write {path} as an object, or remove it")
            else:
                self._take(values, key, path, PLAIN[section][key], value)
        return values

    def _take(self, values: dict[str, Any], key: str, path: str, kind: Kind, value: Any) -> None:
        """Sets a key of `values` to a value of the right kind; adds any other value as a finding, unless it is infinite, which is one."""
        if kind.accepts(value):
            values[key] = _whole(value) if kind.whole else value
        elif not _infinite(value):
            self._add(path, f"is {as_json(value)}", kind.allowed, f"correct {path}, or remove it")

    def _checked_by_deepspeed(self, section: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of a section that a class of DeepSpeed checks."""
        model = import_section_class(section)
        before = len(self._findings.errors)
        values = self._known(section, model, data)
        defaults = {"stage": self._zero_level} if section == "zero_optimization" else {}
        try:
            checked = model(**{**defaults, **values})
        except Exception as error:
            values = _without(values, self._rendered(section, values, error))
            # Once more without what was refused, for what DeepSpeed would convert silently.
            try:
                checked = model(**values)
            except Exception:
                return {}
        result = self._same_types(section, values, checked)
        return result if len(self._findings.errors) == before else {}

    def _known(self, section: str, model: Any, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of known keys, under their usual names; "auto" and what has no effect is left out."""
        fields, values = _fields(model), {}
        for given, value in data.items():
            key = fields[given].name if given in fields else given
            path = _join(section, key)
            if path in REFUSED:
                self._refused(path, value)
            elif given not in fields:
                self._unknown(section, given, sorted({field.name for field in fields.values()}))
            elif key in values or (key != given and key in data):
                self._add(path, f"is given twice, also as {given}", "each key once", "remove one of them")
            elif value == _AUTO:
                self._automatic.append(path)
            elif path in WITHOUT_EFFECT:
                self._dropped.append(path)
            elif path in FIXED:
                self._fixed(path, value)
            elif (inner := fields[given].model) is not None and isinstance(value, dict):
                values[key] = self._known(path, inner, value)
            elif inner is not None and value is not None:
                self._add(path, f"is {as_json(value)}", "a JSON object", f"write {path} as an object, or remove it")
            elif inner is None and not _infinite(value):
                values[key] = value
        return values

    def _fixed(self, path: str, value: Any) -> None:
        """Adds a value other than the only possible one, which is DeepSpeed's default and is left out."""
        fixed = FIXED[path]
        if value is not None and (value != fixed.value or isinstance(value, bool) != isinstance(fixed.value, bool)):
            shown = as_json(value) if not isinstance(value, (dict, list)) else "set"
            self._add(path, f"is {shown}: {fixed.why}", as_json(fixed.value), fixed.do)

    def _rendered(self, section: str, values: Mapping[str, Any], error: Exception) -> list[tuple[str, ...]]:
        """Adds what DeepSpeed's class says about a section, and returns the places of the values that it refuses."""
        records = getattr(error, "errors", None)
        if not callable(records):
            self._add(section, f"is refused by DeepSpeed: {error}", "values that DeepSpeed accepts", f"correct {section}")
            return [(key,) for key in values]
        places = []
        for record in records(include_url=False):
            places.append(tuple(str(part) for part in record["loc"]))
            path = ".".join([section, *places[-1]])
            if not record["loc"] or record["type"] in ("value_error", "assertion_error"):
                message = record["msg"].partition(", ")[2] or record["msg"]
                self._add(path, f"is refused by DeepSpeed: {message}", "values that DeepSpeed accepts", f"correct {path}")
            else:
                given = as_json(record["input"]) if not isinstance(record["input"], dict) else "an object"
                self._add(path, f"is {given}", _allowed(record), f"correct {path}, or remove it")
        return places

    def _same_types(self, path: str, values: Mapping[str, Any], checked: Any) -> dict[str, Any]:
        """Returns the values, with whole numbers such as 5e8 as integers; adds values that DeepSpeed would silently convert."""
        result: dict[str, Any] = {}
        for field in set(_fields(type(checked)).values()):
            if field.name not in values:
                continue
            value, read, where = values[field.name], getattr(checked, field.attribute), _join(path, field.name)
            if isinstance(value, dict) and hasattr(read, "model_fields_set"):
                result[field.name] = self._same_types(where, value, read)
                continue
            if isinstance(read, bool) != isinstance(value, bool) or (isinstance(value, str) and isinstance(read, (int, float))):
                text = isinstance(value, str)
                allowed = "true or false" if isinstance(read, bool) else f"numbers{', without quotation marks' if text else ''}"
                self._add(
                    where, f"is {as_json(value)}", allowed, f"{f'write {as_json(read)}' if text else f'correct {where}'}, or remove it"
                )
            result[field.name] = int(read) if isinstance(value, float) and isinstance(read, int) else value
        return {key: result[key] for key in values if key in result}


@dataclass(frozen=True)
class _Field:
    """A field of one of DeepSpeed's classes: its key in the file, its attribute, and the class of its own keys, if it has one."""

    name: str
    attribute: str
    model: Any = None


def _fields(model: Any) -> dict[str, _Field]:
    """Returns the fields of a class of DeepSpeed by each name that it accepts in a file."""
    result: dict[str, _Field] = {}
    for attribute, info in model.model_fields.items():
        kinds = [info.annotation, *get_args(info.annotation)]
        inner = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        field = _Field(info.alias or attribute, attribute, inner)
        result[attribute] = result[field.name] = field
    return result


def _homes() -> dict[str, set[str]]:
    """Returns the keys of each section, and under "" those outside of sections."""
    homes: dict[str, set[str]] = {section: set(keys) for section, keys in PLAIN.items()}
    for section in CLASSES:
        homes[section] = set(_fields(import_section_class(section)))
    return {"": set(VALUES), **{section: keys - {"enabled"} for section, keys in homes.items()}}


def _allowed(record: Mapping[str, Any]) -> str:
    """Returns the allowed values of a field, from a record of pydantic."""
    kind, context = record["type"], record.get("ctx") or {}
    if kind.startswith("int"):
        return "whole numbers"
    if kind.startswith("bool"):
        return "true or false"
    if kind.startswith(("float", "decimal")):
        return "numbers"
    bounds = {"greater_than": "above", "greater_than_equal": "from", "less_than": "below", "less_than_equal": "up to"}
    if kind in bounds:
        (bound,) = context.values()
        return f"numbers {bounds[kind]} {bound}"
    if "expected" in context:
        # DeepSpeed's enumeration of ZeRO levels has the highest one twice.
        *names, last = dict.fromkeys(re.split(", | or ", str(context["expected"]).replace("'", "")))
        return f"{', '.join(names)} or {last}" if names else last
    text: str = record["msg"]
    return text.removeprefix("Input should be ")


def _without(values: Mapping[str, Any], places: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """Returns the values without those at some places, each of which is given by the keys that lead to it."""
    result = dict(values)
    for place in places:
        if len(place) > 1 and isinstance(inner := result.get(place[0]), dict):
            result[place[0]] = _without(inner, [place[1:]])
        elif place:
            result.pop(place[0], None)
    return result


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value in the file with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, _join(path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}[{number}]")
