"""Reads the values of flags: words of a command line, or values of a YAML file, into numbers, names and lists.

In: flags as they were given (`Given`). Out: a `Reading`: the values by option name, where each is from, and a problem for every flag that
has no right value. Which words a flag takes follows from the type of its field in `options` (`Kind`).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from megatron_patch.config.megatron.flags import key_of
from megatron_patch.config.megatron.translator import COMMAND_LINE, Given
from megatron_patch.config.option_types import option_types, split_mark
from megatron_patch.config.options import Options
from megatron_patch.config.problems import Problem
from megatron_patch.errors import ConfigError
from megatron_patch.utils.console import shortened
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.units import parse_count, parse_duration

NONE = "None"
"""The word that takes back what a file sets, so that the default holds."""
CHECKPOINT = "the checkpoint"
"""The source of values that a checkpoint recorded."""
MAPPING, KEYWORDS = "the mapping", "load_config"
"""The sources of values that come from Python; other sources are paths of files, or `COMMAND_LINE`."""
WITH_COMMAS = {"split", "position_weights", "window_size", "window_attn_skip_freq", "no_rope_freq", "moe_layer_freq"}
_BLENDS = {"data_path", "valid_data_path"}

_MARKED_TYPES = {name: split_mark(hint) for name, hint in option_types(Options).items()}
OPTION_TYPES = {name: kind for name, (kind, _) in _MARKED_TYPES.items()}
RESUME_MARKS = {name: mark for name, (_, mark) in _MARKED_TYPES.items()}


class Form(enum.Enum):
    """How the words of a flag are read."""

    SWITCH = "--name or --no-name"
    COUNT = "a whole number with an optional unit"
    DURATION = "a time with units"
    INTEGER = "a whole number"
    NUMBER = "a number"
    CHOICE = "one of some words"
    TEXT = "a text"
    TEXTS = "several texts"
    INTEGERS = "several whole numbers"


SEVERAL = (Form.TEXTS, Form.INTEGERS)


@dataclass(frozen=True)
class Kind:
    """What an option accepts.

    Args:
        form: how its words are read.
        optional: whether its default may be None.
        choices: the values of `Form.CHOICE`.
    """

    form: Form
    optional: bool = False
    choices: tuple[str | int, ...] = ()


def without_annotations(hint: Any) -> Any:
    """Returns a type without the annotations around it."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _kind(hint: Any) -> Kind:
    metavars = {getattr(item, "metavar", None) for item in getattr(hint, "__metadata__", ())}
    plain = without_annotations(hint)
    alternatives = [kind for kind in get_args(plain) if kind is not NoneType] if NoneType in get_args(plain) else [plain]
    (kind,), optional = alternatives, NoneType in get_args(plain)
    if get_origin(kind) is Literal:
        return Kind(Form.CHOICE, optional, get_args(kind))
    if get_origin(kind) is tuple:
        return Kind(Form.INTEGERS if get_args(kind)[0] is int else Form.TEXTS, optional)
    if "COUNT" in metavars:
        return Kind(Form.COUNT, optional)
    if "TIME" in metavars:
        return Kind(Form.DURATION, optional)
    return Kind({bool: Form.SWITCH, int: Form.INTEGER, float: Form.NUMBER, str: Form.TEXT}[kind], optional)


KINDS: dict[str, Kind] = {name: _kind(hint) for name, hint in OPTION_TYPES.items()}
"""What each option accepts, by its name."""
SWITCHES = {name for name, kind in KINDS.items() if kind.form is Form.SWITCH}
_NAMES = {key_of(name): (name, True) for name in KINDS} | {f"no-{key_of(name)}": (name, False) for name in SWITCHES}
KEYS = frozenset(_NAMES)
"""The flags, without leading dashes: num-layers, bf16, no-bf16."""


@dataclass
class Reading:
    """What some flags say.

    Args:
        values: option name -> value, without options that have their defaults.
        origins: option name -> "flag" or the path of a file.
        problems: what is wrong with other flags.
        wrong: the names of their options.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def read_values(given: Sequence[Given]) -> Reading:
    """Reads flags. Of two flags for one option the later one counts; the single word "None" takes the earlier ones back.

    Args:
        given: the flags; unknown ones are left out.
    """
    last = {_NAMES[flag.key][0]: flag for flag in given if flag.key in _NAMES}
    reading = Reading()
    for name, flag in last.items():
        if flag.words == (NONE,):
            continue
        try:
            reading.values[name] = _value(name, flag)
            reading.origins[name] = flag.source
        except ConfigError as error:
            reading.problems.append(_problem(flag.key, flag.source, error))
            reading.wrong.append(name)
    return reading


def place_of(source: str) -> str:
    """Returns how errors begin that name a value of this source; "" for the command line."""
    return "" if source == COMMAND_LINE else f"{source}: " if source in (CHECKPOINT, MAPPING, KEYWORDS) else f"--config {source}: "


def _problem(key: str, source: str, error: ConfigError) -> Problem:
    """Returns what is wrong with a value: the error has the reason, what is allowed, and what to do; "" stands for a correction."""
    name = f"--{key}" if source == COMMAND_LINE else key.replace("-", "_")
    where = place_of(source)
    full = ConfigError(f"{where}{name}: {error.what}", error.allowed, error.do or f"correct {name}")
    shown = name if not where else f"{name} in {Path(source).name}"
    return Problem(shown, f"{error.what}; allowed: {error.allowed}", full.do or "", full)


def _value(name: str, flag: Given) -> Any:
    """Returns the value that a flag gives.

    Raises:
        ConfigError: the words are not such a value; without the flag's name.
    """
    kind = KINDS[name]
    if kind.form is Form.TEXTS:
        if name in _BLENDS and not all(word.strip() for word in flag.words):
            raise _empty(flag)
        return flag.words
    if kind.form is Form.INTEGERS:
        return tuple(_integer(word) for word in flag.words)
    if kind.form is Form.SWITCH:
        value, words = _NAMES[flag.key][1], flag.words
        if kind.optional and words and words[0] in ("True", "False"):
            value, words = value == (words[0] == "True"), words[1:]
        _no_more(words)
        return value
    if not flag.words:
        raise ConfigError("a value is missing", f"--{flag.key} VALUE", f"give a value after --{flag.key}")
    word = flag.words[0]
    _no_more(flag.words[1:])
    if kind.form is Form.TEXT:
        if not word.strip():
            raise _empty(flag)
        return word
    if kind.form is Form.CHOICE:
        return _choice(kind, word)
    try:
        return _READERS[kind.form](word)
    except ConfigError as error:
        raise ConfigError(error.what, error.allowed) from error


def _empty(flag: Given) -> ConfigError:
    return ConfigError("the value is empty", "a text", f"write a value, or leave {flag.key} out; a variable may be empty")


def _no_more(words: Sequence[str]) -> None:
    if words:
        raise stray(words)


def stray(words: Sequence[str]) -> ConfigError:
    """Returns the error for words of a command line that belong to no flag."""
    return ConfigError(
        f"{shortened(' '.join(words), 80)!r} belongs to no flag",
        "flags with their values; on-off flags such as --bf16 take no value",
        "remove it, or write the flag before it",
    )


def _choice(kind: Kind, word: str) -> str | int:
    by_word = {str(choice): choice for choice in kind.choices}
    if word not in by_word:
        what = f"{shortened(word, 80)!r} is not one of its values"
        raise ConfigError(what, ", ".join(sorted(by_word)), suggestion(word, by_word) or "choose one of these values")
    return by_word[word]


def _integer(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise ConfigError(f"{shortened(word, 80)!r} is not a whole number", "a whole number, as 1234") from error


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise ConfigError(f"{shortened(word, 80)!r} is not a number", "a number, as 0.5 or 3e-4") from error


_READERS: Mapping[Form, Any] = {Form.COUNT: parse_count, Form.DURATION: parse_duration, Form.INTEGER: _integer, Form.NUMBER: _number}


def in_file(values: Mapping[str, Any], source: str) -> tuple[list[Given], list[Problem]]:
    """Returns the keys of a YAML file as flags, without those that are left to their defaults (null), and those with a wrong type.

    Args:
        values: name of the option -> its value.
        source: path of the file, or another source than the command line.
    """
    given, problems = [], []
    for name, value in values.items():
        try:
            flag = None if value is None or value == NONE else _in_file(name, value, source)
        except ConfigError as error:
            problems.append(_problem(name, source, error))
            continue
        given += [flag] if flag is not None else []
    return given, problems


def _in_file(name: str, value: Any, source: str) -> Given:
    kind, key = KINDS[name], key_of(name)
    if kind.form is Form.SWITCH:
        if not isinstance(value, bool):
            do = "remove the line for the model family's default" if kind.optional else "write true or false"
            raise ConfigError(f"{shortened(repr(value))} is no switch", "true or false", do)
        return Given(key if value else f"no-{key}", (), source)
    if name == "stages":
        return Given(key, (value if isinstance(value, str) else json.dumps(value),), source)
    words = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, bool)]
    if words and kind.form in (Form.TEXT, Form.TEXTS):
        what = f"YAML reads a value as {str(words[0]).lower()}, as yes, no, on and off without quotation marks"
        raise ConfigError(what, "a text", "write it in quotation marks, or remove the line")
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        if name in WITH_COMMAS:
            return Given(key, (",".join(str(item) for item in value),), source)
        if kind.form in SEVERAL:
            return Given(key, tuple(str(item) for item in value), source)
    if isinstance(value, (list, dict)):
        what = "a list" if isinstance(value, list) else "a mapping"
        allowed = "one value, or a list of values" if kind.form in SEVERAL else "one value"
        raise ConfigError(f"the value is {what}", allowed, f"write one value after {name}:")
    return Given(key, tuple(str(value).split()) if name in _BLENDS else (str(value),), source)


def missing_options(reading: Reading) -> list[Problem]:
    """Returns the problem of required options that were not given, if there are some."""
    missing = [f"--{key_of(name)}" for name in REQUIRED if name not in reading.values and name not in reading.wrong]
    if not missing:
        return []
    allowed = f"{', '.join(f'--{key_of(name)}' for name in REQUIRED)}, which have no defaults"
    error = ConfigError(f"{' and '.join(missing)} missing", allowed, "give them as flags or in a --config FILE")
    return [Problem(", ".join(missing), "missing; there is no default", error.do or "", error)]


def make_options(values: Mapping[str, Any]) -> Options:
    """Returns options with these values, by name, and otherwise their defaults; required ones must be among them."""
    groups = {}
    for name, group in get_type_hints(Options).items():
        groups[name] = group(**{item.name: values[item.name] for item in fields(group) if item.name in values})
    return Options(**groups)


REQUIRED = [item.name for group in get_type_hints(Options).values() for item in fields(group) if item.default is MISSING]
"""The options without a default."""
