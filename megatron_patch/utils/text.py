"""Texts for messages, without the console: what imports this does not import rich."""

from __future__ import annotations


def shortened(text: str, length: int = 200) -> str:
    """Returns a text of at most `length` characters, for a message; an ellipsis stands for the middle of a longer one."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1 - length // 2) :]}"
