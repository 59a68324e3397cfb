"""Evaluates the assignments of a shell script without running anything, to learn with which arguments it starts training.

In: the text of a script, and values for its variables. Out: its commands as words, the files that it writes as here-documents, and the
names of variables without a value. Known are: variables, arrays, quotes, `${VAR:-default}`, `$((a * b))`, `if` with simple conditions,
here-documents. Loops, functions and `case` are left out, and no command is run.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_patch.cli.shell_conditions import holds
from megatron_patch.cli.shell_words import Token, skip, tokens
from megatron_patch.errors import ConfigError

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
_DECLARING = {"export", "declare", "local", "readonly", "typeset"}
_SEPARATORS = {";", "\n", "&&", "||", "|", "&", ";;"}
_MOST_DEPTH = 20
_LONGEST_VALUE = 1 << 20
UNRESOLVED = re.compile(r"\$\{[^}]*\}")
"""What stands in a word for a part without a value."""
_FUNCTIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass
class Script:
    """What a script would do.

    Args:
        variables: values of variables, arrays as lists.
        commands: the commands, each as its words.
        files: path -> text of a here-document that is written there.
        remarks: conditions that could not be decided, and loops that were left out.
    """

    variables: dict[str, str | list[str]]
    commands: list[list[str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def evaluate(text: str, variables: Mapping[str, str] | None = None) -> Script:
    """Returns what a script would do.

    Args:
        text: the script.
        variables: values of variables that the script takes from its environment, and of its arguments by their number.

    Raises:
        ConfigError: it is nested too deeply, or its variables are too long.
    """
    script = Script({"PWD": ".", "0": "./script.sh", **(variables or {})})
    fixed = set(variables or {})
    try:
        _Runner(script, fixed).run(tokens(text))
    except RecursionError as error:
        raise ConfigError("the script is nested too deeply", "a bash script that starts Megatron", "give the arguments after --") from error
    return script


class _Runner:
    def __init__(self, script: Script, fixed: set[str]) -> None:
        self.script, self.fixed = script, fixed
        self.branches: list[tuple[bool, bool]] = []  # of each `if`: whether a branch was taken, whether this one is
        self.skipping = 0  # depth of loops, functions and `case`

    @property
    def active(self) -> bool:
        return self.skipping == 0 and all(taken for _, taken in self.branches)

    def run(self, parts: Sequence[Token]) -> None:
        """Evaluates the tokens of a script, one simple command after another."""
        simple: list[Token] = []
        condition: list[tuple[list[Token], str]] | None = None
        status: bool | None = True
        before = ""
        for part in [*parts, Token("operator", "\n")]:
            if part.kind == "heredoc":
                self._heredoc(part, simple)
                continue
            if part.kind != "operator" or part.text not in _SEPARATORS or _in_brackets(simple, part):
                simple.append(part)
                continue
            if not simple:
                before = part.text if part.text in ("&&", "||") else before
                continue
            self.last = simple
            word = simple[0].text if simple[0].kind == "word" else ""
            if word in ("if", "elif") or condition is not None:
                if word == "then":
                    self._branch(condition or [])
                    condition, simple = None, simple[1:]
                else:
                    if word == "elif":
                        self.elif_()
                    condition = [*(condition or []), (simple[1:] if word in ("if", "elif") else simple, part.text)]
                    if word == "if":
                        self.branches.append((False, False))
                    simple = []
                    continue
            if simple and not self._keyword(simple):
                wanted = (before == "&&" and status is False) or (before == "||" and status is not False)
                status = self._simple(simple) if self.active and not wanted else status
            before = part.text if part.text in ("&&", "||") else ""
            status = True if not before else status
            simple = []

    def elif_(self) -> None:
        """Ends a branch; whether the next one is taken depends on its condition."""
        if self.branches:
            self.branches[-1] = (self.branches[-1][0] or self.branches[-1][1], False)

    def _branch(self, condition: list[tuple[list[Token], str]]) -> None:
        if not self.branches:
            return
        done = self.branches[-1][0]
        outer = all(taken for _, taken in self.branches[:-1]) and self.skipping == 0
        value = False if done or not outer else self._decide(condition)
        self.branches[-1] = (done or value, value)

    def _decide(self, condition: list[tuple[list[Token], str]]) -> bool:
        result: bool | None = None
        before = ""
        for simple, separator in condition:
            value = self._test(simple)
            result = value if not before else (result and value) if before == "&&" else (result or value)
            before = separator if separator in ("&&", "||") else ""
        if result is None:
            shown = " ".join(part.text for simple, _ in condition for part in simple)
            self.script.remarks.append(f"a condition could not be decided and was taken as false: {shown[:80]}")
        return bool(result)

    def _keyword(self, simple: list[Token]) -> bool:
        """Handles the words of the shell's own structure; returns whether nothing of the command is left."""
        word = simple[0].text if simple[0].kind == "word" else ""
        function = len(simple) > 2 and simple[1].text == "(" and simple[2].text == ")"
        if word in ("for", "while", "until", "case", "function", "select") or function:
            if self.active:
                self.script.remarks.append(f"left out: {' '.join(part.text for part in simple)[:60]} …")
            self.skipping += 1
        elif word in ("done", "esac") or (word == "}" and self.skipping):
            self.skipping = max(0, self.skipping - 1)
        elif word == "else" and not self.skipping:
            if self.branches:
                taken = self.branches[-1][0] or self.branches[-1][1]
                self.branches[-1] = (taken, not taken)
            del simple[0]
            return not simple or self._keyword(simple)
        elif word == "fi":
            if self.branches:
                self.branches.pop()
        elif word in ("then", "do", "{"):
            del simple[0]
            return not simple
        else:
            return False
        return True

    def _simple(self, simple: list[Token]) -> bool | None:
        """Evaluates assignments and records a command; returns its status if it is known."""
        first = simple[0].text
        if first in ("[", "[[", "test"):
            return self._test(simple)
        words: list[str] = []
        assigning = True
        skipped = False
        for index, part in enumerate(simple):
            if skipped:
                skipped = False
                continue
            if part.kind == "array":
                items = [word for inner in tokens(part.text) if inner.kind == "word" for word in self.expand(inner.text)]
                old = self.script.variables.get(part.name, [])
                self._set(part.name, [*(old if isinstance(old, list) else [old]), *items] if part.appends else items)
                continue
            if part.kind == "operator":
                skipped = part.text in (">", ">>", "&>", "&>>", "<", ">&", "<&", "<<<")
                if part.text in (">", ">>", ">&", "<") and index and re.fullmatch("[0-9]", simple[index - 1].text) and words:
                    words.pop()  # the number of what is redirected
                continue
            found = _ASSIGNMENT.fullmatch(part.text)
            if found and (assigning or words[:1] == ["export"] or (words and words[0] in _DECLARING)):
                value = " ".join(self.expand(found[3], split=False))
                old = self.script.variables.get(found[1], "")
                self._set(found[1], f"{old if isinstance(old, str) else ' '.join(old)}{value}" if found[2] == "+=" else value)
                continue
            assigning = False
            words += self.expand(part.text)
        if words and words[0] not in _DECLARING:
            self.script.commands.append(words)
            return None
        return True

    def _set(self, name: str, value: str | list[str]) -> None:
        if sum(map(len, value)) > _LONGEST_VALUE:
            raise ConfigError(f"the script's variable {name} is too long", f"{_LONGEST_VALUE:,} characters", "give the arguments after --")
        if name not in self.fixed:
            self.script.variables[name] = value

    def _heredoc(self, part: Token, simple: list[Token]) -> None:
        command = simple or getattr(self, "last", [])
        for index, word in enumerate(command[:-1]):
            if word.text in (">", ">>") and self.active:
                path = " ".join(self.expand(command[index + 1].text, split=False))
                text = part.text if part.appends else self.text(part.text)
                self.script.files[path] = text

    # Expansion

    def expand(self, word: str, split: bool = True, depth: int = 0) -> list[str]:
        """Returns the words that a word becomes; with `split` False, exactly one."""
        fields: list[str] = []
        current: str | None = None
        index = 0
        while index < len(word):
            end = skip(word, index)
            piece = word[index:end]
            if piece[0] == "'":
                current = (current or "") + piece[1:-1]
            elif piece[0] == "\\":
                current = (current or "") + piece[1:]
            elif piece[0] == '"':
                inner = piece[1:-1]
                array = re.fullmatch(r"\$(?:\{(\w+)\[@\]\}|@)", inner)
                if array and split:
                    items = self._array(array[1])
                    if items:
                        fields += [(current or "") + items[0], *items[1:]]
                        current = fields.pop()
                else:
                    current = (current or "") + self.text(inner, depth)
            elif piece[0] in "$`":
                value, end = self._expansion(word, index, depth)
                quoted = re.fullmatch(r"""\$\{\w+:?[-=]("[^"]*"|'[^']*')\}""", word[index:end])
                parts = value.split() if split and not quoted else [value]
                if split and (not parts or value[:1].isspace()) and current is not None:
                    fields.append(current)
                    current = None
                if parts:
                    *done, current = [(current or "") + parts[0], *parts[1:]]
                    fields += done
                    if split and value[-1:].isspace():
                        fields.append(current)
                        current = None
            else:
                current = (current or "") + piece
            index = end
        if current is not None:
            fields.append(current)
        return fields if split else ["".join(fields)]

    def text(self, text: str, depth: int = 0) -> str:
        """Returns a text of double quotes or of a here-document with its variables replaced."""
        result, index = "", 0
        while index < len(text):
            if text[index] == "\\" and text[index + 1 : index + 2] in ('"', "$", "`", "\\"):
                result += text[index + 1]
                index += 2
            elif text[index] in "$`":
                value, index = self._expansion(text, index, depth)
                result += value
            else:
                result += text[index]
                index += 1
        return result

    def _array(self, name: str | None) -> list[str]:
        if name is None:
            found = self.script.variables.get("@", [])
            return found if isinstance(found, list) else shlex.split(found)
        value = self.script.variables.get(name)
        return [f"${{{name}}}"] if value is None else value if isinstance(value, list) else [value]

    def _value(self, name: str) -> str | None:
        value = self.script.variables.get(name)
        return " ".join(value) if isinstance(value, list) else value

    def _expansion(self, text: str, start: int, depth: int) -> tuple[str, int]:
        """Returns the value of the expansion that begins at `start`, and the index after it."""
        if depth > _MOST_DEPTH:
            return "", len(text)
        if text.startswith("$((", start):
            end = skip(text, start)
            return self._arithmetic(text[start + 3 : end - 2], depth), end
        if text.startswith("$(", start) or text[start] == "`":
            end = skip(text, start)
            return self._command(text[start + (2 if text[start] == "$" else 1) : end - 1]), end
        if text.startswith("${", start):
            end = skip(text, start)
            return self._parameter(text[start + 2 : end - 1], depth), end
        if found := re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])").match(text, start):
            name = found[1]
            if name in "@*":
                return " ".join(self._array(None)), found.end()
            value = self._value(name)
            return f"${{{name}}}" if value is None else value, found.end()
        return text[start], start + 1

    def _parameter(self, inner: str, depth: int) -> str:
        found = re.fullmatch(r"(\w+|[@*])(?:\[[@*]\])?(?:(:?[-=+?])(.*))?", inner, re.DOTALL)
        if found is None:
            return "${" + inner.replace("}", "").replace("{", "") + "}"
        name, how, other = found.groups()
        value = " ".join(self._array(None)) if name in ("@", "*") else self._value(name)
        if how is None:
            return f"${{{name}}}" if value is None else value
        missing = value is None or (how[0] == ":" and value == "")
        if how[-1] == "+":
            return "" if missing else self.text(self._unquoted(other), depth + 1)
        if not missing and value is not None:
            return value
        if how[-1] == "?":
            return f"${{{name}}}"
        result = self.text(self._unquoted(other), depth + 1)
        if how[-1] == "=":
            self._set(name, result)
        return result

    @staticmethod
    def _unquoted(text: str) -> str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text

    def _command(self, inner: str) -> str:
        if inner.strip() == "pwd":
            return "."
        if (found := re.fullmatch(r"\s*(basename|dirname)\s+(\S+)\s*", inner)) and not UNRESOLVED.search(
            path := self.text(found[2]).strip('"')
        ):
            head, _, tail = path.rpartition("/")
            return tail if found[1] == "basename" else head or "."
        if found := re.fullmatch(r"\s*(?:realpath|readlink -f)\s+(\S+)\s*", inner):
            return self.text(found[1]).strip('"')
        return "${" + re.sub(r"\W+", "_", inner).strip("_")[:40] + "}"

    def _arithmetic(self, inner: str, depth: int) -> str:
        filled = self.text(inner, depth + 1)
        filled = (
            re.sub(r"[A-Za-z_]\w*", lambda match: self._value(match[0]) or f"${{{match[0]}}}", filled) if "${" not in filled else filled
        )
        filled = filled.replace("_", "") if re.fullmatch(r"[\d_\s()+*/%-]+", filled) else filled
        try:
            return str(_number(ast.parse(filled.strip().replace("/", "//"), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return "${" + re.sub(r"[{}$\s]", "", filled)[:60] + "}"

    # Conditions

    def _test(self, simple: list[Token]) -> bool | None:
        """Returns whether a condition in brackets holds; None if that cannot be known."""
        negated = bool(simple) and simple[0].text == "!"
        parts = simple[1:] if negated else simple
        if not parts or parts[0].text not in ("[", "[[", "test"):
            return None
        words = [UNRESOLVED.sub("", " ".join(self.expand(part.text, split=False))) for part in parts[1:] if part.text not in ("]", "]]")]
        result = holds(words)
        return result if result is None or not negated else not result


def _in_brackets(simple: list[Token], part: Token) -> bool:
    """Returns whether an operator is inside of `[[ … ]]`, where it joins conditions and not commands."""
    opened = sum((word.text == "[[") - (word.text == "]]") for word in simple)
    return opened > 0 and part.text in ("&&", "||")


def _number(node: ast.expr) -> int:
    """Returns the value of an expression of whole numbers.

    Raises:
        ValueError: it has anything else, or is too large.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _FUNCTIONS:
        value = _FUNCTIONS[type(node.op)](_number(node.left), _number(node.right))
        if abs(value) < 1 << 63:
            return value
    raise ValueError("not an expression of whole numbers")
