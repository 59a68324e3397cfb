"""From the command line and a YAML file to `Options`, with the origin of every value.

In: the argument list. Out: `Parsed(options, origins)`. A file's keys become flags placed before the command line's, so that both are
read by one parser, with the same names, types and units; flags win. Unknown keys and flags end with the nearest known name.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from megatron_patch.config.options import OptionalSwitch, Options
from megatron_patch.config.yaml_files import load_yaml
from megatron_patch.errors import ConfigError
from megatron_patch.utils.registry import suggestion


@dataclass(frozen=True)
class Parsed:
    """Options and where each came from.

    Args:
        options: all values.
        origins: option name -> "flag" or the file's name; what is absent has its default.
    """

    options: Options
    origins: Mapping[str, str]


def _without_annotations(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _option_types() -> dict[str, Any]:
    """Returns the annotated type of each option by its name, over all groups."""
    types: dict[str, Any] = {}
    for group in get_type_hints(Options).values():
        hints = get_type_hints(group, include_extras=True)
        types.update({f.name: hints[f.name] for f in fields(group)})
    return types


OPTION_TYPES = _option_types()
_BOOLEANS = {name for name, hint in OPTION_TYPES.items() if hint is bool}
_TRISTATES = {name for name, hint in OPTION_TYPES.items() if hint == OptionalSwitch}
_LISTS = {name for name, hint in OPTION_TYPES.items() if get_origin(_without_annotations(hint)) is tuple}
_WITH_COMMAS = {"split", "position_weights"}


def read_yaml(path: str) -> dict[str, Any]:
    """Reads a configuration file: one flat mapping of option names (with dashes or underscores), and `stages:` as a list.

    Raises:
        ConfigError: no such file, no valid YAML, no mapping, an unknown or repeated key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = load_yaml(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", "a readable YAML file", "check the path") from error
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}", "a mapping of option names to values") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} holds a {type(data).__name__}", "a mapping of option names to values")
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in OPTION_TYPES:
            raise ConfigError(
                f"--config {path}: unknown key {key!r}",
                "the names of the flags (pretrain_gpt_patch.py --help)",
                suggestion(name, OPTION_TYPES) or "remove it",
            )
        if name in result:
            raise ConfigError(f"--config {path}: {key!r} is given twice", "each option once", "remove one")
        result[name] = value
    return result


def to_flags(values: Mapping[str, Any], source: str) -> list[str]:
    """Turns a file's values into flags.

    Raises:
        ConfigError: a value of a kind that no flag takes.
    """
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if name in _BOOLEANS:
            if not isinstance(value, bool):
                raise ConfigError(f"{source}: {name} is {value!r}", "true or false")
            flags.append(flag if value else "--no-" + name.replace("_", "-"))
        elif name in _TRISTATES and not isinstance(value, bool):
            raise ConfigError(f"{source}: {name} is {value!r}", "true or false", "leave it out for what the model's family does")
        elif name == "stages":
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
        elif isinstance(value, list) and name in _WITH_COMMAS:
            flags += [flag, ",".join(str(item) for item in value)]
        elif isinstance(value, list) and name in _LISTS:
            flags += [flag, *(str(item) for item in value)]
        elif isinstance(value, list):
            raise ConfigError(f"{source}: {name} is a list", "one value", "write the option's value after its name")
        elif isinstance(value, dict):
            raise ConfigError(f"{source}: {name} is a mapping", "one value", "write the option's value after its name")
        elif name == "data_path" or name == "valid_data_path":
            flags += [flag, *str(value).split()]
        else:
            flags += [flag, str(value)]
    return flags


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` or `--config=FILE` out of the arguments."""
    path, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            if path is not None:
                raise ConfigError("--config is given twice", "one configuration file", "merge the files")
            path = argument[len("--config=") :] if "=" in argument else next(arguments, None)
            if not path:
                raise ConfigError("--config without a file", "--config FILE.yaml")
        else:
            rest.append(argument)
    return path, rest


def _normalise(argv: Sequence[str]) -> list[str]:
    """Underscores in flag names become dashes; a bare three-state flag becomes `--name True`, its `--no-` form `--name False`."""
    result: list[str] = []
    for index, argument in enumerate(argv):
        if not argument.startswith("--"):
            result.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if name in _TRISTATES and not equals and following not in ("True", "False", "None"):
            result += ["--" + name.replace("_", "-"), "True"]
        elif name.startswith("no_") and name[3:] in _TRISTATES:
            result += ["--" + name[3:].replace("_", "-"), "False"]
        else:
            result.append("--" + name.replace("_", "-") + equals + value)
    return result


def _names(flags: Sequence[str]) -> list[str]:
    """The option names among normalised flags."""
    names = []
    for flag in flags:
        if flag.startswith("--"):
            name = flag[2:].partition("=")[0].replace("-", "_")
            names.append(name[3:] if name.startswith("no_") and name[3:] in _BOOLEANS else name)
    return names


def _flatten(hint: type) -> Any:
    return tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)(hint)


def parse(argv: Sequence[str], program: str = "pretrain_gpt_patch.py") -> Parsed:
    """Reads flags and, where `--config` names one, a YAML file.

    Raises:
        ConfigError: unknown or malformed flags or keys, missing options.
        SystemExit: after `--help`, with code 0.
    """
    path, rest = _take_config(argv)
    flags = _normalise(rest)
    origins: dict[str, str] = {}
    file_flags: list[str] = []
    if path is not None:
        file_flags = _normalise(to_flags(read_yaml(path), f"--config {path}"))
        origins.update(dict.fromkeys(_names(file_flags), path))
    for name in _names(flags):
        if name not in OPTION_TYPES and name != "help":
            raise ConfigError(
                f"unknown flag --{name.replace('_', '-')}",
                "the flags that --help lists",
                (suggestion(name, OPTION_TYPES) or "remove it").replace("_", "-"),
            )
        origins[name] = "flag"
    return Parsed(_run_tyro([*file_flags, *flags], program), origins)


def _run_tyro(flags: list[str], program: str) -> Options:
    output = io.StringIO()
    if "--help" in flags or "-h" in flags:
        return tyro.cli(_flatten(Options), args=flags, prog=program)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(_flatten(Options), args=flags, prog=program)
    except SystemExit as error:
        text = " ".join(re.sub(r"[│╭╮╰╯─]+|-{4,}", " ", line).strip() for line in output.getvalue().splitlines())
        text = re.sub(r"\s+", " ", text.partition("For full helptext")[0]).strip()
        raise ConfigError(text or "the command line cannot be read", "the flags that --help lists") from error


def option_values(options: Any) -> dict[str, Any]:
    """All options as one flat mapping of name to value."""
    values: dict[str, Any] = {}
    for group in fields(options):
        part = getattr(options, group.name)
        assert is_dataclass(part)
        values.update({f.name: getattr(part, f.name) for f in fields(part)})
    return values
