"""The help text of each option: the docstring below its field in `options`. Out: texts by option name."""

from __future__ import annotations

import ast
import inspect
import itertools
from functools import cache
from typing import get_type_hints

from megatron_patch.config import options


@cache
def help_texts() -> dict[str, str]:
    """Returns the help text of each option by its name, in the order of the help, with the line breaks of the docstring."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(options)).body if isinstance(node, ast.ClassDef)}
    texts: dict[str, str] = {}
    for group in get_type_hints(options.Options).values():
        body = classes[group.__name__].body
        for line, following in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else ""
                texts[line.target.id] = inspect.cleandoc(str(text))
    return texts


def first_sentence(text: str) -> str:
    """Returns the first sentence of a help text, without its full stop."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".")
