"""Turns the command line and a YAML file into `Options`, with the origin of every value.

In: the argument list. Out: `ParsedOptions`. The keys of a file become flags that precede those of the command line. One parser reads
both, so names, types and units are the same, and the values of the command line, which come later, override the file's.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin

import tyro

from megatron_patch.config.checks import check_text
from megatron_patch.config.option_types import OptionalSwitch, flag_of, option_types, split_mark
from megatron_patch.config.options import ModelOptions, Options
from megatron_patch.config.yaml_files import MOST_YAML_BYTES, load_yaml
from megatron_patch.errors import ConfigError
from megatron_patch.programs import command
from megatron_patch.raw_text.encodings import HEAD_BYTES, other_encoding
from megatron_patch.utils.files import read_small, reason
from megatron_patch.utils.registry import suggestion


@dataclass(frozen=True)
class ParsedOptions:
    """All options, and where the values came from.

    Args:
        options: the values.
        origins: option name -> "flag" or the path of the file; options that are missing here have their defaults.
    """

    options: Options
    origins: Mapping[str, str]


def _without_annotations(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


_MARKED_TYPES = {name: split_mark(hint) for name, hint in option_types(Options).items()}
OPTION_TYPES = {name: kind for name, (kind, _) in _MARKED_TYPES.items()}
RESUME_MARKS = {name: mark for name, (_, mark) in _MARKED_TYPES.items()}
_BOOLEANS = {name for name, hint in OPTION_TYPES.items() if hint is bool}
_TRISTATES = {name for name, hint in OPTION_TYPES.items() if hint == OptionalSwitch}
_LISTS = {name for name, hint in OPTION_TYPES.items() if get_origin(_without_annotations(hint)) is tuple}
_FLAGS = [name.replace("_", "-") for name in OPTION_TYPES]
_REQUIRED = [flag_of(f.name) for f in fields(ModelOptions) if f.default is MISSING]
_WITH_COMMAS = {"split", "position_weights"}


def read_yaml(path: str) -> dict[str, Any]:
    """Reads a configuration file: one flat mapping of option names (with dashes or underscores), and `stages:` as a list.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, is not a mapping, or has an unknown or repeated key.
    """
    try:
        content = read_small(path, MOST_YAML_BYTES, wait=True)
        if (other := other_encoding(content[:HEAD_BYTES])) is not None:
            raise ConfigError(f"--config {path} looks like {other.words}", "UTF-8", f"convert it with iconv -f {other.name} -t UTF-8")
        data = load_yaml(content.decode())
    except OSError as error:
        raise ConfigError(f"--config {path}: {reason(error)}", "a readable YAML file", "check the path") from error
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
        if name not in OPTION_TYPES:
            raise ConfigError(
                f"--config {path}: unknown key {key!r}",
                "the names of the flags, without the leading dashes (pretrain_gpt_patch.py --help)",
                suggestion(name, OPTION_TYPES) or "remove the line",
            )
        if name in result:
            raise ConfigError(f"--config {path}: {key!r} is given twice", "each option once", "remove one of the two lines")
        result[name] = value
    return result


def to_flags(values: Mapping[str, Any], source: str) -> list[str]:
    """Returns the values of a file as flags.

    Args:
        values: option name -> value.
        source: how errors call the file.

    Raises:
        ConfigError: a value has a type that its flag does not take.
    """
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if name in _BOOLEANS:
            if not isinstance(value, bool):
                raise ConfigError(f"{source}: {name} is {value!r}", "true or false", "write true or false")
            flags.append(flag_of(name) if value else flag_of(f"no_{name}"))
        elif name in _TRISTATES and not isinstance(value, bool):
            raise ConfigError(f"{source}: {name} is {value!r}", "true or false", "remove the line for the model family's default")
        elif name == "stages":
            flags += [flag_of(name), value if isinstance(value, str) else json.dumps(value)]
        elif isinstance(value, list) and name in _WITH_COMMAS:
            flags += [flag_of(name), ",".join(str(item) for item in value)]
        elif isinstance(value, list) and name in _LISTS:
            flags += [flag_of(name), *(str(item) for item in value)]
        elif isinstance(value, list):
            raise ConfigError(f"{source}: {name} is a list", "one value", f"write one value after {name}:")
        elif isinstance(value, dict):
            raise ConfigError(f"{source}: {name} is a mapping", "one value", f"write one value after {name}:")
        elif name == "data_path" or name == "valid_data_path":
            flags += [flag_of(name), *str(value).split()]
        else:
            flags += [flag_of(name), str(value)]
    return flags


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


def _normalize(argv: Sequence[str]) -> list[str]:
    """Returns arguments as tyro reads them: flags with dashes; three-state flags as `--name True` or `--name False`."""
    result: list[str] = []
    for index, argument in enumerate(argv):
        if not argument.startswith("--"):
            result.append(argument)
            continue
        given, equals, value = argument.partition("=")
        name = given[2:].replace("-", "_")
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if name in _TRISTATES and not equals and following not in ("True", "False", "None"):
            result += [flag_of(name), "True"]
        elif name.startswith("no_") and name[3:] in _TRISTATES:
            result += [flag_of(name[3:]), "False"]
        else:
            result.append(flag_of(name) + equals + value)
    return result


def _names(flags: Sequence[str]) -> list[str]:
    """Returns the names of the options that normalized arguments set."""
    names = []
    for flag in flags:
        if flag.startswith("--"):
            name = flag[2:].partition("=")[0].replace("-", "_")
            names.append(name[3:] if name.startswith("no_") and name[3:] in _BOOLEANS else name)
    return names


def _flatten(hint: type) -> Any:
    return tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)(hint)


def parse(argv: Sequence[str], program: str | None = None) -> ParsedOptions:
    """Reads a command line and the YAML file that its `--config` names, if any.

    Args:
        argv: the arguments, without the program's name.
        program: the program's name in the help text; None: the command that was called, or pretrain_gpt_patch.py.

    Raises:
        ConfigError: a flag or key is unknown or malformed, or a required one is missing.
        SystemExit: with code 0, after `--help` has been printed.
    """
    check_text(argv)
    path, rest = _take_config(argv)
    flags = _normalize(rest)
    origins: dict[str, str] = {}
    file_flags: list[str] = []
    if path is not None:
        file_flags = _normalize(to_flags(read_yaml(path), f"--config {path}"))
        check_text(file_flags, f"--config {path}: ")
        origins.update(dict.fromkeys(_names(file_flags), path))
    for name in _names(flags):
        if name not in OPTION_TYPES and name != "help":
            raise ConfigError(
                f"unknown flag {flag_of(name)}",
                "the flags that --help lists",
                suggestion(name.replace("_", "-"), _FLAGS, prefix="--") or "remove the flag",
            )
        origins[name] = "flag"
    return ParsedOptions(_run_tyro([*file_flags, *flags], program or command() or "pretrain_gpt_patch.py"), origins)


def _run_tyro(flags: list[str], program: str) -> Options:
    """Returns the options that normalized flags set; an error of tyro becomes a ConfigError with its text in one line."""
    output = io.StringIO()
    if "--help" in flags or "-h" in flags:
        return tyro.cli(_flatten(Options), args=flags, prog=program)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(_flatten(Options), args=flags, prog=program)
    except SystemExit as error:
        text = " ".join(re.sub(r"[│╭╮╰╯─]+|-{4,}", " ", line).strip() for line in output.getvalue().splitlines())
        text = re.sub(r"\s+", " ", text.partition("For full helptext")[0]).strip()
        raise _config_error(text) from error


def _config_error(text: str) -> ConfigError:
    """Returns the error in three parts for an error message of tyro in one line; unknown messages are kept as they are."""
    if match := re.search(r"Error parsing (--\S+): (.*?) ?(?:Argument helptext:|$)", text):
        flag, reason = match.groups()
        if with_units := re.fullmatch(r"(.*) \(allowed: (.*)\)", reason):
            return ConfigError(f"{flag}: {with_units[1]}", with_units[2], f"correct {flag}")
        value = (re.findall(r"'[^']*'", reason) or [reason])[0][:80]
        if "float" in reason:
            return ConfigError(f"{flag}: {value} is not a number", "a number, as 0.5 or 3e-4", f"correct {flag}")
        if "int" in reason:
            return ConfigError(f"{flag}: {value} is not a whole number", "a whole number, as 1234", f"correct {flag}")
        return ConfigError(f"{flag}: {reason}", "the values that --help lists", f"correct {flag}")
    if match := re.search(r"invalid choice '(.*)' for argument '(--\S+)'\. Expected one of \((.*?),?\)", text):
        value, flag = match[1], match[2]
        choices = sorted(set(re.findall(r"'([^']*)'", match[3])) - {"None"})
        return ConfigError(f"{flag} {value}", ", ".join(choices), suggestion(value, choices) or "choose one of these values")
    if text.startswith("Required options"):
        missing = " and ".join(flag for flag in _REQUIRED if f"{flag} " in text)
        return ConfigError(
            f"{missing} missing", f"{', '.join(_REQUIRED)}, which have no defaults", "give them as flags or in a --config FILE"
        )
    if match := re.search(r"Missing value for argument '(--\S+)'", text):
        return ConfigError(f"{match[1]} without a value", f"{match[1]} VALUE", f"give a value after {match[1]}")
    if match := re.search(r"Unrecognized options: (.*)", text):
        what = f"{match[1]!r} on the command line belongs to no flag"
        return ConfigError(
            what, "flags with their values; on-off flags such as --bf16 take no value", "remove it, or write the flag before it"
        )
    return ConfigError(text or "the command line cannot be read", "the flags that --help lists", "correct the command line or the file")


def recorded_options(values: Mapping[str, Any], groups: Sequence[type]) -> Options:
    """Returns options that a checkpoint recorded (`option_values`); all other groups have their defaults.

    Args:
        values: the recorded values by name; names that the program no longer has are left out.
        groups: the groups to read, such as `StageOptions`; not the model's.

    Raises:
        ConfigError: a value is not one that its flag takes.
    """
    wanted = {f.name for group in groups for f in fields(group)}
    found = {name: value for name, value in values.items() if name in wanted}
    for name, value in found.items():
        words = value if isinstance(value, list) else [value]
        if any(isinstance(word, str) and word.startswith("-") for word in words):
            raise ConfigError(f"the checkpoint: {name} is {value!r}"[:300], "a value that is no flag", "use another checkpoint")
    found = {name: value for name, value in found.items() if value != []}
    required = [word for flag in _REQUIRED for word in (flag, "1")]
    return _run_tyro([*required, *_normalize(to_flags(found, "the checkpoint"))], "checkpoint")


def option_values(options: Any) -> dict[str, Any]:
    """Returns all options, of all groups, by name."""
    values: dict[str, Any] = {}
    for group in fields(options):
        part = getattr(options, group.name)
        assert is_dataclass(part)
        values.update({f.name: getattr(part, f.name) for f in fields(part)})
    return values
