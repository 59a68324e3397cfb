"""Resolves a run from Python values: a YAML file or a mapping, then flags, then keywords, by the parser of the command line.

In: settings. Out: a `RunConfig`, which `pretrain` and `plan` take. A later setting overrides an earlier one: default, file or mapping,
`args`, keyword.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_patch.api.arguments import whole
from megatron_patch.config.checks import check_text
from megatron_patch.config.megatron.command_line import split
from megatron_patch.config.megatron.flags import key_of
from megatron_patch.config.megatron.translator import Given
from megatron_patch.config.parsing import given_in_file, parse_given, read_yaml
from megatron_patch.config.resolve import RunConfig, planned_ranks, resolve
from megatron_patch.config.values import KEYWORDS, KINDS, MAPPING, NONE
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.errors import ConfigError

Source = str | os.PathLike[str] | Mapping[str, Any]


def load_config(source: Source | None = None, /, *, args: Sequence[str] = (), world_size: int | None = None, **options: Any) -> RunConfig:
    """Resolves and checks the configuration of a run.

    Args:
        source: a YAML file, or a mapping of option names to values as such a file has it; None: no file.
        args: flags as on the command line, such as `["--num-layers", "2"]`; they override the source.
        world_size: number of ranks that the run is for; None: the ranks of this job, which is one without a launcher.
        options: options by the names of their flags, with underscores: `num_layers=2, train_tokens="4M", bf16=True`. They override the
            source and `args`; None takes the value of the source back.

    Returns:
        The run: its options (`config.options`), model (`config.shape`), stages (`config.plan`) and notes on what may surprise.

    Raises:
        ConfigError: a name is unknown, a value is not possible, or the run is not; the message suggests names and values.
        DataError: the metadata file of the first corpus is damaged.
    """
    if isinstance(args, str) or not isinstance(args, Sequence) or not all(isinstance(word, str) for word in args):
        raise ConfigError(
            "args is not a list of texts",
            "a list of flags and values, each a text",
            'give each word as a text of its own: args=["--num-layers", "2"]',
        )
    if "--help" in args or "-h" in args or "--version" in args:
        raise ConfigError("args contain --help or --version", "the flags of a run", "run megatron-patch pretrain --help")
    if any(word == "--config" or word.startswith("--config=") for word in args):
        raise ConfigError("args contain --config", "a YAML file as the first argument", "write load_config(FILE, args=…)")
    check_text(args)
    if isinstance(source, Mapping):
        values = {str(name).replace("-", "_"): value for name, value in source.items()}
        if len(values) < len(source):
            names = [str(name).replace("-", "_") for name in source]
            twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
            raise ConfigError(f"the mapping has {twice} twice, with dashes and with underscores", "each option once", "remove one of them")
        given, problems = given_in_file(_plain(values), MAPPING)
    elif source is not None and not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"load_config of {'a run that is resolved' if isinstance(source, RunConfig) else 'a value of type ' + type(source).__name__}",
            "a YAML file's path, or a mapping of option names to values",
            "give what the run was made of, with the options that differ as keywords"
            if isinstance(source, RunConfig)
            else "write load_config(FILE) or load_config({…})",
        )
    else:
        given, problems = given_in_file(read_yaml(os.fspath(source)), os.fspath(source)) if source is not None else ([], [])
    words, flags = split(args)
    keywords, wrong = given_in_file(_plain(options), KEYWORDS)
    taken_back = [Given(key_of(name), (NONE,), KEYWORDS) for name, value in options.items() if value is None and name in KINDS]
    parsed = parse_given([*given, *flags, *keywords, *taken_back], [*problems, *wrong], words)
    return resolve(parsed, planned_ranks(parsed, ranks_from_environment()[1]) if world_size is None else whole("world_size", world_size, 1))


def as_config(config: RunConfig | Source) -> RunConfig:
    """Returns a run as it is, and anything else as `load_config` resolves it."""
    return config if isinstance(config, RunConfig) else load_config(config)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as a YAML file would have them."""
    return {name: _plain_value(name, value) for name, value in values.items()}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        # A list, because a text of several words would be several paths.
        return [os.fspath(value)] if name in ("data_path", "valid_data_path") else os.fspath(value)
    if isinstance(value, bytes):
        raise ConfigError(f"{name or 'an item of a list'} is given as bytes", "text, numbers, lists and paths", "decode it: value.decode()")
    if hasattr(value, "tolist"):  # numbers and arrays of numpy, tensors of torch
        return _plain_value(name, value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain_value("", item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_value("", item) for item in value]
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)  # 4e9 tokens
    return value
