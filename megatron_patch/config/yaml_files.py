"""Safe YAML loader: reads files that are not trusted. In: text. Out: numbers, strings, lists and mappings.

Tags that would create other objects are refused, and so are references that would expand to a very large number of values.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import yaml

MOST_YAML_BYTES = 1 << 22
"""The most bytes of a file: several times those of a list of ten thousand shards. Reading them takes seconds and hundreds of megabytes."""
_MOST_VALUES = 100_000


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
    """Checks the number of values in a text before they are held in memory, where each takes about a kilobyte while it is read.

    Raises:
        ValueError: there are too many.
    """
    # libyaml reads ten times faster; not every package of PyYAML has it.
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    starts = (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionStartEvent)
    with contextlib.suppress(yaml.YAMLError):  # the reader itself says better where
        if sum(1 for event in itertools.islice(events, 3 * _MOST_VALUES) if isinstance(event, starts)) > _MOST_VALUES:
            raise _too_many()


def _too_many() -> ValueError:
    return ValueError(f"it expands to more than {_MOST_VALUES:,} values")
