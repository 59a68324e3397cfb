"""Turns the command line and a YAML file into `Options`, with the origin of every value.

In: the argument list. Out: `ParsedOptions`. The keys of a file become flags that precede those of the command line. One parser reads
both, so names, types and units are the same, and the values of the command line, which come later, override the file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import tyro

from megatron_patch.config.checks import check_numbers, check_options, check_text
from megatron_patch.config.megatron.command_line import MegatronReport, pasteable, problems_of_rows, report, split
from megatron_patch.config.megatron.flags import key_of
from megatron_patch.config.megatron.translate import translate
from megatron_patch.config.megatron.translator import COMMAND_LINE, MEGATRON_FLAGS, Given, Translation
from megatron_patch.config.options import Options
from megatron_patch.config.problems import Problem, one_error, problem_of, problems_of
from megatron_patch.config.values import (
    CHECKPOINT,
    KEYS,
    KINDS,
    REQUIRED,
    in_file,
    make_options,
    missing_options,
    place_of,
    read_values,
    stray,
)
from megatron_patch.config.yaml_files import MOST_YAML_BYTES, RepeatedKeys, load_yaml
from megatron_patch.errors import ConfigError
from megatron_patch.programs import command, how_to_get
from megatron_patch.raw_text.encodings import HEAD_BYTES, other_encoding
from megatron_patch.utils.console import print_lines
from megatron_patch.utils.files import read_small, reason
from megatron_patch.utils.pipes import reader_may_leave
from megatron_patch.utils.versions import versions


@dataclass(frozen=True)
class ParsedOptions:
    """All options, and where the values came from.

    Args:
        options: the values.
        origins: option name -> "flag" or the path of the file; options that are missing here have their defaults.
        megatron: what became of flags that only Megatron has; None: there were none.
    """

    options: Options
    origins: Mapping[str, str]
    megatron: MegatronReport | None = None


def read_yaml(path: str) -> dict[str, Any]:
    """Reads a configuration file: one flat mapping of option names (with dashes or underscores), and `stages:` as a list.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, is not a mapping, or has a repeated key.
    """
    try:
        content = read_small(path, MOST_YAML_BYTES, wait=True)
        if (other := other_encoding(content[:HEAD_BYTES])) is not None:
            raise ConfigError(f"--config {path} looks like {other.words}", "UTF-8", f"convert it with iconv -f {other.name} -t UTF-8")
        data = load_yaml(content.decode())
    except OSError as error:
        raise ConfigError(f"--config {path}: {reason(error)}", "a readable YAML file", how_to_get(path) or "check the path") from error
    except RepeatedKeys as error:
        raise ConfigError(f"--config {path}: {error}", "each key once in a mapping", "remove the other lines") from error
    except ValueError as error:
        raise ConfigError(
            f"--config {path} is not valid YAML: {error}", "a mapping of option names to values", "correct the file"
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"--config {path} is a {type(data).__name__}, not a mapping",
            "a mapping of option names to values",
            'write one "name: value" on each line',
        )
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in result:
            raise ConfigError(f"--config {path}: {key!r} is given twice", "each option once", "remove one of the two lines")
        result[name] = value
    return result


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the file of `--config FILE` or `--config=FILE`, and the other arguments."""
    path, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            if path is not None:
                raise ConfigError("--config is given twice", "one configuration file", "merge the two files")
            path = argument[len("--config=") :] if "=" in argument else next(arguments, None)
            if not path:
                raise ConfigError("--config without a file", "--config FILE.yaml", "give the path of a YAML file")
        else:
            rest.append(argument)
    return path, rest


def _flatten(hint: type) -> Any:
    return tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)(hint)


def parse(argv: Sequence[str], program: str | None = None) -> ParsedOptions:
    """Reads a command line and the YAML file that its `--config` names, if any. Both may have flags of Megatron, which are translated.

    Args:
        argv: the arguments, without the program's name.
        program: the program's name in the help text; None: the command that was called, or pretrain_gpt_patch.py.

    Raises:
        ConfigError: flags or keys are unknown, malformed or not possible here, or required ones are missing; the message has all of them.
        SystemExit: after `--help` or `--version` has been printed.
    """
    check_text(argv)
    _help_or_version(argv, program or command() or "pretrain_gpt_patch.py")
    path, rest = _take_config(argv)
    words, given = split(rest)
    of_file, problems = ([], []) if path is None else given_in_file(read_yaml(path), path)
    return parse_given([*of_file, *given], problems, words)


def parse_given(given: Sequence[Given], problems: list[Problem], words: Sequence[str] = ()) -> ParsedOptions:
    """Turns flags of all sources into options; flags of Megatron are translated.

    Args:
        given: the flags; of two for one option the later one counts.
        problems: what was wrong with others.
        words: words of the command line that belong to no flag.

    Raises:
        ConfigError: as for `parse`.
    """
    translation = translate(given, KEYS, dry_run=any(flag.key == "dry-run" for flag in given))
    problems = problems + problems_of_rows(translation.problems)
    reading = read_values(translation.flags)
    wrong = [*map(problem_of, [stray(words)] if words else []), *reading.problems, *missing_options(reading)]
    problems += wrong
    # Without those that are wrong, so that the others are checked, too. A wrong number of experts is not as none.
    experts = {"num_experts": 2} if any(problem.flag.startswith(("--num-experts", "num_experts")) for problem in problems) else {}
    options = make_options({**dict.fromkeys(REQUIRED, 1), **reading.values, **experts})
    if problems:
        problems += problems_of(lambda: check_numbers(options)) or problems_of(lambda: check_options(options, reading.origins))
        raise _error(problems, translation, given, options)
    return ParsedOptions(options, reading.origins, report(translation, given, options))


def _error(problems: list[Problem], translation: Translation, given: Sequence[Given], options: Options) -> ConfigError:
    """Returns the error for all problems; a command line in Megatron's words gets the flags that it becomes."""
    if not any(row.given.key in MEGATRON_FLAGS for row in translation.problems):
        return one_error(problems)
    wrong = {problem.flag.partition(" ")[0] for problem in problems}
    own = [flag for flag in translation.flags if flag.source == COMMAND_LINE and f"--{flag.key}" not in wrong]
    said = report(translation, given, options)
    advice = f"the other flags are these here:\n{pasteable(own)}" if own else None
    return one_error(problems, said.notes if said else (), advice)


def given_in_file(data: Mapping[str, Any], source: str) -> tuple[list[Given], list[Problem]]:
    """Returns the keys of a YAML file as flags, and a problem for each value that its flag does not take.

    Args:
        data: option name -> value.
        source: path of the file, or how errors call another source.
    """
    given, problems = in_file({name: value for name, value in data.items() if name in KINDS}, source)
    for name, value in data.items():
        if name not in KINDS and value is not None and value is not False:
            known = MEGATRON_FLAGS.get(key_of(name))
            many = known is not None and known.values is None
            texts = [str(item) for item in value] if isinstance(value, list) else str(value).split() if many else [str(value)]
            given.append(Given(key_of(name), () if value is True else tuple(texts), source))
    for flag in given:
        check_text(flag.words, place_of(source))
    return given, problems


def _help_or_version(argv: Sequence[str], program: str) -> None:
    """Prints the text of `--help` or `--version` if a command line has one of them, and ends the process."""
    with reader_may_leave():
        if "--help" in argv or "-h" in argv:
            tyro.cli(_flatten(Options), args=["--help"], prog=program)
        if "--version" in argv:
            print_lines(versions())
            raise SystemExit(0)


def recorded_options(values: Mapping[str, Any], groups: Sequence[type]) -> Options:
    """Returns options that a checkpoint recorded (`option_values`); all other groups have their defaults.

    Args:
        values: the recorded values by name; names that the program no longer has are left out.
        groups: the groups to read, such as `StageOptions`; not the model's.

    Raises:
        ConfigError: a value is not one that its flag takes.
    """
    wanted = {f.name for group in groups for f in fields(group)}
    found = {name: value for name, value in values.items() if name in wanted and value != []}
    flags, problems = in_file(found, CHECKPOINT)
    reading = read_values(flags)
    if problems or reading.problems:
        raise one_error([*problems, *reading.problems])
    return make_options({**dict.fromkeys(REQUIRED, 1), **reading.values})


def option_values(options: Any) -> dict[str, Any]:
    """Returns all options, of all groups, by name."""
    values: dict[str, Any] = {}
    for group in fields(options):
        part = getattr(options, group.name)
        assert is_dataclass(part)
        values.update({f.name: getattr(part, f.name) for f in fields(part)})
    return values
