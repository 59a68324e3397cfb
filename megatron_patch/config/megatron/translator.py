"""Translates flags of Megatron into those of this program by the kind in the table, and says of each what became of it.

In: the flags of a file and of a command line, in order (`Given`). Out: a `Translation`: the flags of this program, a row for each flag of
Megatron that was translated or has no effect, and the problems: flags that do not exist here or nowhere, with what to write instead.
Nothing is dropped or changed without a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_patch.config.megatron.flags import Kind, MegatronFlag, key_of
from megatron_patch.config.megatron.long_tail import LONG_TAIL
from megatron_patch.config.megatron.table import MAIN

MEGATRON_FLAGS: dict[str, MegatronFlag] = {flag.key: flag for flag in (*MAIN, *LONG_TAIL)}
"""The flags of Megatron by name, with dashes."""

COMMAND_LINE = "flag"
"""The source of a flag that is on the command line; other sources are paths of files."""


@dataclass(frozen=True)
class Given:
    """A flag with its values, as it was given.

    Args:
        key: its name with dashes, without the leading ones.
        words: its values.
        source: "flag", or the path of the file that has it.
    """

    key: str
    words: tuple[str, ...]
    source: str = COMMAND_LINE

    @property
    def text(self) -> str:
        """The flag as the user may have written it, with at most 40 characters of its values."""
        name = MEGATRON_FLAGS[self.key].name if self.key in MEGATRON_FLAGS else self.key
        values = " ".join(self.words)
        values = values if len(values) <= 40 else f"{values[:39]}…"
        return f"--{name} {values}".rstrip()


@dataclass(frozen=True)
class Row:
    """What became of one flag.

    Args:
        given: the flag and its values.
        meaning: what it means here.
        becomes: the flags of this program that stand for it, or what to write; "": nothing.
        other_model: a problem: the flag belongs to a model or program that does not exist here.
    """

    given: Given
    meaning: str
    becomes: str = ""
    other_model: bool = False


@dataclass
class Translation:
    """The result: flags of this program, and what was said about those of Megatron.

    Args:
        flags: the flags of this program, in order; of two with one name the later one counts.
        rows: flags of Megatron that became flags of this program.
        ignored: flags of Megatron that have no effect.
        problems: flags that cannot be translated.
    """

    flags: list[Given] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ignored: list[Row] = field(default_factory=list)
    problems: list[Row] = field(default_factory=list)

    @property
    def in_megatrons_words(self) -> bool:
        """Whether there was a flag that only Megatron has."""
        return bool(self.rows or self.ignored or self.problems)


class Translator:
    """Translates one list of flags.

    Args:
        given: the flags, those of a file before those of the command line.
        ours: names of the flags of this program.
        dry_run: whether the run is only planned, so that it needs no data.
        functions: what translates single flags, by name; all others are translated by their kind.
    """

    def __init__(
        self,
        given: Sequence[Given],
        ours: Collection[str],
        dry_run: bool,
        functions: Mapping[str, Callable[[Translator, Given, MegatronFlag], None]],
    ) -> None:
        self.given, self.ours, self.dry_run, self.functions = given, ours, dry_run, functions
        self.result = Translation()
        self.last = {flag.key: flag for flag in given}  # of two, the later one counts
        self.replaced: list[Given] = []  # flags of this program for which another flag counts

    def value(self, *keys: str) -> str | None:
        """Returns the first value of the first of these flags that was given."""
        found = next((self.last[key] for key in keys if key in self.last), None)
        return found.words[0] if found is not None and found.words and found.words[0] != "None" else None

    def emit(self, given: Given, *flags: str, meaning: str) -> None:
        """Adds flags of this program, such as "--rope-scaling linear", for a flag of Megatron."""
        for flag in flags:
            name, *words = flag.split(" ")
            self.result.flags.append(Given(key_of(name), tuple(words), given.source))
        self.result.rows.append(Row(given, meaning, " ".join(flags)))

    def ignore(self, given: Given, meaning: str) -> None:
        """Notes a flag that has no effect."""
        self.result.ignored.append(Row(given, meaning))

    def refuse(self, given: Given, meaning: str, write: str = "", other_model: bool = False) -> None:
        """Notes a problem."""
        self.result.problems.append(Row(given, meaning, write or f"remove --{MEGATRON_FLAGS[given.key].name}", other_model))

    def run(self) -> Translation:
        """Translates all flags."""
        for given in self.given:
            flag = MEGATRON_FLAGS.get(given.key)
            again = given.key not in self.ours and self.last[given.key] is not given
            if again or any(given is other for other in self.replaced):
                continue
            if flag is not None and flag.key not in self.ours and (problem := _wrong_count(given, flag)):
                self.refuse(given, problem, f"write --{flag.name}{' VALUE' if flag.values else ''}")
            elif flag is not None and flag.key in self.functions and not (flag.kind is Kind.VALUES and given.words[:1] == ("None",)):
                self.functions[flag.key](self, given, flag)
            elif given.key in self.ours:
                self.result.flags.append(given)
            elif flag is None:
                self._unknown(given)
            else:
                self._by_kind(given, flag)
        return self.result

    def _unknown(self, given: Given) -> None:
        close = [f"--{key}" for key in difflib.get_close_matches(given.key.lower(), sorted(self.ours), n=3) if _misspelt(given.key, key)]
        meaning = "unknown: a flag neither of this program nor of Megatron"
        self.result.problems.append(Row(given, meaning, f"did you mean {' or '.join(close)}?" if close else f"remove --{given.key}"))

    def _by_kind(self, given: Given, flag: MegatronFlag) -> None:
        if flag.kind is Kind.RENAMED:
            words = "" if flag.values == 0 or " " in flag.here else " " + " ".join(given.words)
            self.emit(given, f"{flag.here}{words}", meaning=flag.text)
        elif flag.kind is Kind.IGNORED:
            self.ignore(given, flag.text)
        elif flag.kind is Kind.DETAIL:
            master = self.last.get(flag.here)
            master_flag = MEGATRON_FLAGS[flag.here]
            if master is not None and not master_flag.is_harmless(list(master.words)):
                self.refuse(given, flag.text, "", master_flag.kind is Kind.OTHER_MODEL)
            else:
                self.ignore(given, f"{flag.text}, which is off")
        elif flag.is_harmless(list(given.words)):
            self.ignore(given, f"{flag.text}; this value changes nothing")
        else:
            self.refuse(given, flag.text, flag.here, flag.kind is Kind.OTHER_MODEL)


def _wrong_count(given: Given, flag: MegatronFlag) -> str | None:
    """Returns what is wrong with the number of values of a flag that only Megatron has, or None."""
    if flag.values == 0 and given.words:
        return f"{given.words[0]!r} belongs to no flag"
    if flag.values == 1 and len(given.words) != 1:
        return "without a value" if not given.words else f"{given.words[1]!r} belongs to no flag"
    return None


def _misspelt(name: str, known: str) -> bool:
    """Returns whether a name is a misspelling of a flag, and not another word: lr-warmup-hours is no misspelling of lr-warmup-tokens."""
    pairs = list(zip(name.lower().split("-"), known.split("-"), strict=False))
    if len(pairs) < max(name.count("-"), known.count("-")) + 1:
        pairs = [(name.lower().replace("-", ""), known.replace("-", ""))]
    return all(difflib.SequenceMatcher(None, first, second).ratio() >= 0.75 for first, second in pairs)
