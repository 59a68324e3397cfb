"""What the parser of the program needs of Megatron's flags: a command line in parts, and the report on what was translated.

In: arguments, then the translation and the options. Out: `Given` records; a `MegatronReport` for the console; problems for one error.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_patch.config.megatron import muon
from megatron_patch.config.megatron.flags import LM, Kind, key_of
from megatron_patch.config.megatron.translator import COMMAND_LINE, MEGATRON_FLAGS, Given, Row, Translation
from megatron_patch.config.options import Options
from megatron_patch.config.problems import Problem
from megatron_patch.config.values import KINDS, place_of
from megatron_patch.errors import ConfigError
from megatron_patch.model.families import FAMILIES
from megatron_patch.model.shape import default_ffn_hidden_size

_OURS = {key_of(name) for name in KINDS}


@dataclass(frozen=True)
class MegatronReport:
    """What the program made of a command line, or a file, in Megatron's words.

    Args:
        rows: flags that were translated: (as given, what it is here, why).
        ignored: flags without an effect: (the flags as given, why).
        notes: where the run differs from what Megatron's defaults would make it.
    """

    rows: tuple[tuple[str, str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def ignored_text(self) -> str:
        """The flags without an effect in one line, with their reasons."""
        return "; ".join(f"{flags} ({why})" for flags, why in self.ignored)


def split(argv: Sequence[str], source: str = COMMAND_LINE) -> tuple[list[str], list[Given]]:
    """Returns the words before the first flag, and the flags with their values.

    Args:
        argv: the arguments, as `--name value`, `--name=value` or `--name`.
        source: where they are from.
    """
    stray: list[str] = []
    parts: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            parts.append((key_of(name), [value] if equals else []))
        elif parts:
            parts[-1][1].append(word)
        else:
            stray.append(word)
    return stray, [Given(key, tuple(words), source) for key, words in parts]


def arguments(flags: Sequence[Given]) -> list[str]:
    """Returns flags as arguments."""
    result: list[str] = []
    for flag in flags:
        if len(flag.words) == 1 and flag.words[0].startswith("--"):
            result.append(f"--{flag.key}={flag.words[0]}")
        else:
            result += [f"--{flag.key}", *flag.words]
    return result


def problems_of_rows(rows: Sequence[Row]) -> list[Problem]:
    """Returns flags that cannot be translated as problems; details of one refused flag are one problem."""
    problems: dict[object, Problem] = {}
    for row in rows:
        flag = MEGATRON_FLAGS.get(row.given.key)
        detail = flag is not None and flag.kind is Kind.DETAIL
        key = (row.given.source, row.meaning) if detail else len(problems)
        new = _problem(row)
        old = problems.get(key)
        problems[key] = new if old is None else replace(old, flag=f"{old.flag}, {new.flag}", write="remove them")
    return list(problems.values())


def _problem(row: Row) -> Problem:
    of_file = row.given.source != COMMAND_LINE
    shown = f"{row.given.text.removeprefix('--')} in {row.given.source}" if of_file else row.given.text
    write = re.sub(r"--([\w-]+)", r"\1", row.becomes) if of_file else row.becomes
    if row.given.key not in MEGATRON_FLAGS:
        what, allowed = f"unknown flag --{row.given.key}", "the flags that --help lists"
        if of_file:
            what = f"{place_of(row.given.source)}unknown key {row.given.key.replace('-', '_')!r}"
            allowed, write = "the names of the flags, without the leading dashes (--help lists them)", write.replace("-", "_")
        return Problem(shown, row.meaning, write, ConfigError(what, allowed, write))
    error = ConfigError(f"{shown}: {row.meaning}", "the flags that --help lists, and those of docs/migrating.md", _imperative(write))
    return Problem(shown, row.meaning, write, error)


def _imperative(text: str) -> str:
    return text if text.startswith(("remove", "write", "export", "did")) else f"write {text}"


def pasteable(flags: Sequence[Given], width: int = 96) -> str:
    """Returns flags as lines that a shell reads as one command line; of two with one name, the later one."""
    last = {flag.key: flag for flag in flags}
    lines, line = [], " "
    for flag in flags:
        if last[flag.key] is not flag:
            continue
        text = " ".join(shlex.quote(word) for word in arguments([flag]))
        if len(line) + len(text) > width and line.strip():
            lines.append(line)
            line = " "
        line += f" {text}"
    return " \\\n".join([*lines, line])


def report(translation: Translation, given: Sequence[Given], options: Options) -> MegatronReport | None:
    """Returns what is to be said about a translation, or None for a command line that has no flag of Megatron alone.

    Args:
        translation: the translation.
        given: the flags as given.
        options: the options that follow.
    """
    if not translation.in_megatrons_words:
        return None
    reasons: dict[str, list[str]] = {}
    for row in translation.ignored:
        reasons.setdefault(row.meaning, []).append(row.given.text)
    return MegatronReport(
        rows=tuple((row.given.text, row.becomes, row.meaning) for row in translation.rows),
        ignored=tuple((", ".join(flags), why) for why, flags in reasons.items()),
        notes=tuple(_notes({flag.key: flag for flag in (*given, *translation.flags)}, options)),
    )


def _notes(given: Mapping[str, Given], options: Options) -> list[str]:
    """Returns where the run differs from Megatron's defaults for what was not given."""
    notes = []
    if "model-family" not in given and options.model.model_family in FAMILIES:
        notes += _family_notes(given, options.model.model_family)
    notes += _width_note(given, options)
    notes += _learning_notes(given, options)
    notes += _update_notes(options)
    grouped = {"num-key-value-heads", "group-query-attention"} & set(given)
    of_megatron_lm = any(MEGATRON_FLAGS[key].source == LM for key in given if key in MEGATRON_FLAGS and key not in _OURS)
    if "num-query-groups" in given and not grouped and of_megatron_lm:
        notes.append("Megatron-LM reads --num-query-groups only together with --group-query-attention; here it counts alone")
    return notes


def _family_notes(given: Mapping[str, Given], name: str) -> list[str]:
    """Returns where the family that nobody chose gives the model another kind than Megatron's defaults."""
    family = FAMILIES[name]
    rotary, biased, tied = family.position_embedding == "rope", family.linear_bias, family.tie_embeddings
    kinds = (
        ("normalization", family.normalization, "LayerNorm", "--normalization LayerNorm"),
        ("swiglu", "SwiGLU" if family.swiglu else "GeGLU" if family.geglu else "GELU", "GELU", "--no-swiglu"),
        (
            "position-embedding-type",
            "rotary positions" if rotary else "learned positions",
            "learned positions",
            "--position-embedding-type learned_absolute",
        ),
        ("disable-bias-linear", "biases" if biased else "no biases", "biases", "--no-disable-bias-linear"),
        (
            "untie-embeddings-and-output-weights",
            "a tied head" if tied else "an untied head",
            "a tied head",
            "--no-untie-embeddings-and-output-weights",
        ),
    )
    differ = [kind for kind in kinds if kind[0] not in given and f"no-{kind[0]}" not in given and kind[1] != kind[2]]
    because = ""
    if "swiglu" not in given and "no-swiglu" not in given:
        because = f"The model family is {name}, the default, because neither --model-family nor --swiglu is given. "
    if not differ:
        return [because.rstrip()] if because else []
    has, others = ", ".join(kind[1] for kind in differ), ", ".join(kind[2] for kind in differ)
    write = "--model-family gpt2" if len(differ) == len(kinds) else " ".join(kind[3] for kind in differ)
    return [f"{because}The model has {has}; Megatron's defaults are {others}: for those, write {write}"]


def _width_note(given: Mapping[str, Given], options: Options) -> list[str]:
    """Returns a note if Megatron's default width of a SwiGLU layer is another one."""
    hidden, swiglu = options.model.hidden_size, options.model.swiglu
    if "ffn-hidden-size" in given or not swiglu:
        return []
    here, there = default_ffn_hidden_size(hidden, swiglu), int((4 * hidden * 2 / 3) / 64) * 64
    if "glu-activation" in given:  # of BigScience's fork, which keeps four times the hidden size
        there = 4 * hidden
    if here == there:
        return []
    return [f"--ffn-hidden-size is {here:,} by default; Megatron's default is {there:,} (--ffn-hidden-size {there})"]


def _learning_notes(given: Mapping[str, Given], options: Options) -> list[str]:
    """Returns a note on the defaults of learning that differ."""
    schedule = options.schedule
    style = schedule.lr_decay_style or ("WSD" if options.stages.recipe == "token-superposition" else "cosine")
    values: tuple[tuple[str, str, str], ...] = (
        ("weight-decay", f"weight decay {schedule.weight_decay:g}", "0.01"),
        ("adam-beta2", f"Adam's beta 2 {schedule.adam_beta2:g}", "0.999"),
        ("lr-decay-style", f"{style} decay", "linear"),
    )
    if style == "WSD":
        values += (("lr-wsd-decay-style", f"{schedule.lr_wsd_decay_style} final decay", "exponential"),)
    differ = [f"{here} instead of {there} (--{key} {there})" for key, here, there in values if key not in given]
    differ += muon.different_defaults(given, schedule)
    if "attention-dropout" not in given or "hidden-dropout" not in given:
        differ.append("no dropout instead of 0.1")
    return [f"Learning differs from Megatron's defaults: {', '.join(differ)}"] if differ else []


def _update_notes(options: Options) -> list[str]:
    """Returns notes on what Muon does otherwise than Megatron's."""
    model, family = options.model, FAMILIES.get(options.model.model_family)
    if options.schedule.optimizer != "muon" or family is None:
        return []
    swiglu = family.swiglu if model.swiglu is None else model.swiglu
    return muon.other_updates(swiglu, (model.position_embedding_type or family.position_embedding) != "rope")
