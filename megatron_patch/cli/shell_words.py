"""Splits a shell script into tokens: words as they are written, operators, arrays and here-documents. Nothing is run.

In: the text of a script. Out: `Token` records, from which `shell_script` evaluates assignments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_OPERATORS = ("&&", "||", ";;", "&>>", "&>", ">>", ">&", "<&", "<<<", ";", "|", "&", "(", ")", ">", "<", "\n")
_ARRAY = re.compile(r"([A-Za-z_]\w*)(\+?=)\($")


@dataclass(frozen=True)
class Token:
    """A part of a script.

    Args:
        kind: what it is.
        text: the word as written, with quotes and variables; the operator; the content of an array; the text of a here-document.
        name: of an array: its name. Of a here-document: its end word.
        appends: of an array: whether it is added to one of the same name. Of a here-document: whether its end word is quoted.
    """

    kind: Literal["word", "operator", "array", "heredoc"]
    text: str
    name: str = ""
    appends: bool = False


def tokens(script: str) -> list[Token]:
    """Returns the tokens of a script; a quote or a parenthesis that is not closed ends with the script."""
    return list(_Lexer(script.replace("\r\n", "\n").replace("\\\n", "")).run())


def skip(text: str, start: int) -> int:
    """Returns the index after the quote, expansion or escape that begins at `start`, or start + 1 where none begins."""
    two = text[start : start + 2]
    if text[start] == "\\":
        return start + 2
    if text[start] == "'":
        end = text.find("'", start + 1)
        return len(text) if end < 0 else end + 1
    if text[start] == "`":
        end = text.find("`", start + 1)
        return len(text) if end < 0 else end + 1
    if text[start] == '"':
        return _until(text, start + 1, '"')
    if two == "$(":
        return _until(text, start + 2, ")", "(")
    if two == "${":
        return _until(text, start + 2, "}", "{")
    return start + 1


def _until(text: str, start: int, end: str, begin: str = "") -> int:
    """Returns the index after the next `end` that is in no quote or expansion, and closes no further `begin`."""
    index, depth = start, 1
    while index < len(text):
        character = text[index]
        if character == end:
            depth -= 1
            if depth == 0:
                return index + 1
            index += 1
        elif character == begin:
            depth += 1
            index += 1
        elif end == '"' and character == "'":
            index += 1  # an apostrophe inside of double quotes is a character
        else:
            index = skip(text, index)
    return len(text)


class _Lexer:
    def __init__(self, text: str) -> None:
        self.text, self.index = text, 0
        self.heredocs: list[tuple[str, bool, bool]] = []

    def run(self) -> Iterator[Token]:
        while self.index < len(self.text):
            character = self.text[self.index]
            if character in " \t":
                self.index += 1
            elif character == "#":
                end = self.text.find("\n", self.index)
                self.index = len(self.text) if end < 0 else end
            elif self.text.startswith("<<", self.index) and not self.text.startswith("<<<", self.index):
                self._heredoc_begin()
            elif operator := next((word for word in _OPERATORS if self.text.startswith(word, self.index)), None):
                self.index += len(operator)
                yield Token("operator", operator)
                if operator == "\n":
                    yield from self._heredoc_bodies()
            else:
                yield self._word()

    def _word(self) -> Token:
        start = self.index
        while self.index < len(self.text):
            character = self.text[self.index]
            if character == "(" and (found := _ARRAY.match(self.text[start : self.index + 1])):
                inside = self.index + 1
                self.index = _until(self.text, inside, ")", "(")
                return Token("array", self.text[inside : self.index - 1], found[1], found[2] == "+=")
            if character in " \t\n;|&<>()":
                break
            self.index = skip(self.text, self.index)
        return Token("word", self.text[start : self.index])

    def _heredoc_begin(self) -> None:
        self.index += 2
        strips = self.text.startswith("-", self.index)
        self.index += strips
        while self.text[self.index : self.index + 1] in (" ", "\t"):
            self.index += 1
        word = self._word().text
        self.heredocs.append((word.strip("'\"\\"), word[:1] in ("'", '"', "\\"), strips))

    def _heredoc_bodies(self) -> Iterator[Token]:
        for end, quoted, strips in self.heredocs:
            lines = []
            while self.index < len(self.text):
                stop = self.text.find("\n", self.index)
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.index : stop]
                self.index = stop + 1
                if (line.lstrip("\t") if strips else line) == end:
                    break
                lines.append(line)
            yield Token("heredoc", "\n".join(lines), end, quoted)
        self.heredocs = []
