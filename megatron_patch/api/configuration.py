"""Resolves a run from Python values: a YAML file or a mapping, then flags, then keywords, by the parser of the command line.

In: settings. Out: a `RunConfig`, which `pretrain` and `plan` take. A later setting overrides an earlier one: default, file or mapping,
`args`, keyword.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

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
    if "--help" in args or "-h" in args or "--version" in args:
        raise ConfigError("args contain --help or --version", "the flags of a run", "run megatron-patch pretrain --help")
    if any(word == "--config" or word.startswith("--config=") for word in args):
        raise ConfigError("args contain --config", "a YAML file as the first argument", "write load_config(FILE, args=…)")
    check_text(args)
    if isinstance(source, Mapping):
        values = {str(name).replace("-", "_"): value for name, value in source.items()}
        given, problems = given_in_file(_plain(values), MAPPING)
    else:
        given, problems = given_in_file(read_yaml(os.fspath(source)), os.fspath(source)) if source is not None else ([], [])
    words, flags = split(args)
    keywords, wrong = given_in_file(_plain(options), KEYWORDS)
    taken_back = [Given(key_of(name), (NONE,), KEYWORDS) for name, value in options.items() if value is None and name in KINDS]
    parsed = parse_given([*given, *flags, *keywords, *taken_back], [*problems, *wrong], words)
    return resolve(parsed, planned_ranks(parsed, ranks_from_environment()[1]) if world_size is None else _checked(world_size))


def as_config(config: RunConfig | Source) -> RunConfig:
    """Returns a run as it is, and anything else as `load_config` resolves it."""
    return config if isinstance(config, RunConfig) else load_config(config)


def ranks_of(config: RunConfig) -> int:
    """Returns the number of ranks that a run was resolved for."""
    engine = config.options.engine
    return config.data_parallel_size * engine.tensor_model_parallel_size * engine.pipeline_model_parallel_size


def _checked(world_size: int) -> int:
    if type(world_size) is not int or world_size < 1:
        raise ConfigError(f"world_size={world_size!r}", "whole numbers from 1", "give the number of ranks")
    return world_size


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as a YAML file would have them."""
    return {name: _plain_value(name, value) for name, value in values.items()}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        # A list, because a text of several words would be several paths.
        return [os.fspath(value)] if name in ("data_path", "valid_data_path") else os.fspath(value)
    if isinstance(value, (tuple, list)):
        return [_plain_value("", item) if name != "stages" else item for item in value]
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)  # 4e9 tokens
    return value
