"""YAML that somebody else may have written: plain values alone, and not many more of them than the text is long.

In: text. Out: numbers, texts, lists and mappings. Tags that would make other objects are refused, as are references that would unfold
into millions of values.
"""

from __future__ import annotations

from typing import Any

import yaml

_MOST_VALUES = 100_000


def load_yaml(text: str) -> Any:
    """The value of a YAML or JSON text.

    Raises:
        ValueError: it is neither, holds more than plain values, refers to itself, or unfolds into too many.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    todo, count = [value], 0
    while todo:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it unfolds into more than {_MOST_VALUES:,} values")
        item = todo.pop()
        if isinstance(item, (list, tuple, set)):
            todo += list(item)
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
    return value
