"""Safe YAML loader: reads files that are not trusted. In: text. Out: numbers, strings, lists and mappings.

Tags that would create other objects are refused, and so are references that would expand to a very large number of values.
"""

from __future__ import annotations

import contextlib
from typing import Any

import yaml

MOST_YAML_BYTES = 1 << 22
"""The most bytes of a file: several times those of a list of ten thousand shards. Reading them takes seconds and hundreds of megabytes."""
_MOST_VALUES = 100_000
_MOST_LEVELS = 200


def load_yaml(text: str) -> Any:
    """Returns the value of a YAML or JSON text.

    Raises:
        ValueError: the text is invalid, has tags or objects, refers to itself, or expands to too many values.
    """
    try:
        _check_count(text)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
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
