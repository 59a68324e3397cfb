"""An extension of griffe, which reads the docstrings for the reference: the fields of NamedTuples and Protocols are attributes.

Docstrings list the fields of every record under `Args`. That is right for dataclasses, whose fields are arguments. A NamedTuple and a
Protocol have no signature in which griffe could look the names up.
"""

from __future__ import annotations

from typing import Any

import griffe


class RecordFields(griffe.Extension):
    """Turns the section `Args` of NamedTuples and Protocols into `Attributes`."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Changes the docstring of a class that griffe has read."""
        if cls.docstring is not None and any(str(base) in ("NamedTuple", "Protocol") for base in cls.bases):
            cls.docstring.value = cls.docstring.value.replace("\nArgs:\n", "\nAttributes:\n")
