"""Safe YAML loader: reads files that are not trusted. In: text. Out: numbers, strings, lists and mappings.

Tags that would create other objects are refused, and so are references that would expand to a very large number of values.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import yaml

MOST_YAML_BYTES = 1 << 22
"""The most bytes of a file: several times those of a list of ten thousand shards. Reading them takes seconds and hundreds of megabytes."""
_MOST_VALUES = 100_000
_MOST_LEVELS = 200


class RepeatedKeys(ValueError):
    """Mappings of a text have a key more than once.

    Args:
        places: each such key with the lines, from 1, that have it.
    """

    def __init__(self, places: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.places = tuple(places)
        words = [f"{key!r} is given {_times(len(lines))} (lines {', '.join(map(str, lines))})" for key, lines in places]
        super().__init__("; ".join(words))


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also finds repeated keys; of those, PyYAML itself keeps the last one."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[str, list[int]]] = []

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Returns the text of a scalar. JSON writes a character such as an emoji as two escapes, which PyYAML reads as two characters."""
        text = super().construct_scalar(node)
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return text

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Notes repeated keys before PyYAML replaces merge keys (<<), whose mappings may have the same keys as this one."""
        lines: dict[tuple[str, str], list[int]] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                lines.setdefault((key.tag, key.value), []).append(key.start_mark.line + 1)
        self.repeated += [(key[1], found) for key, found in lines.items() if len(found) > 1]
        super().flatten_mapping(node)


def _number_or_text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Returns a number; those to base 8 or 60 (012, 1:30), which nobody means in a configuration, as text."""
    if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
        return node.value
    return loader.construct_yaml_float(node) if node.tag.endswith("float") else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _number_or_text)
_Loader.add_constructor("tag:yaml.org,2002:float", _number_or_text)


def load_yaml(text: str) -> Any:
    """Returns the value of a YAML or JSON text.

    Raises:
        ValueError: the text is invalid, has tags or objects, refers to itself, or expands to too many values.
        RepeatedKeys: a mapping, at any level, has a key more than once.
    """
    try:
        _check_count(text)
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if loader.repeated:
        raise RepeatedKeys(loader.repeated)
    todo, count = [value], 0  # references can make more of them than the text has
    while todo:
        count += 1
        if count > _MOST_VALUES:
            raise _too_many()
        item = todo.pop()
        if isinstance(item, (list, tuple, set)):
            todo += list(item)
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
    return value


def _check_count(text: str) -> None:
    """Checks how many values a text has, and how deeply they are nested, before they are held in memory, where each takes about a kilobyte
    while it is read. The time of deep nesting grows with the square of the number of levels.

    Raises:
        ValueError: there are too many values or levels.
    """
    # libyaml reads ten times faster; not every package of PyYAML has it.
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    values = levels = 0
    with contextlib.suppress(yaml.YAMLError):  # the reader itself says better where
        for event in events:
            levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            values += isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionStartEvent))
            if levels > _MOST_LEVELS:
                raise ValueError("it is nested too deeply")
            if values > _MOST_VALUES:
                raise _too_many()


def _too_many() -> ValueError:
    return ValueError(f"it expands to more than {_MOST_VALUES:,} values")
