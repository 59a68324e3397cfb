"""Resolves a run from Python values: a YAML file or a mapping, then flags, then keywords, by the parser of the command line.

In: settings. Out: a `RunConfig`, which `pretrain` and `plan` take. A later setting overrides an earlier one: default, file or mapping,
`args`, keyword.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.parsing import OPTION_TYPES, parse, to_flags
from megatron_patch.config.resolve import RunConfig, planned_ranks, resolve
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.errors import ConfigError
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.units import plural

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
    if "--help" in args or "-h" in args:
        raise ConfigError("args contain --help", "the flags of a run", "read the help with megatron-patch pretrain --help")
    words: list[str] = []
    if isinstance(source, Mapping):
        values = {str(name).replace("-", "_"): value for name, value in source.items()}
        _check_names(values, "the mapping")
        words += to_flags(_plain(values), "the mapping")
    elif source is not None:
        words += ["--config", os.fspath(source)]
    words += args
    _check_names(options, "load_config")
    words += to_flags(_plain(options), "load_config")
    words += [word for name, value in options.items() if value is None for word in (flag_of(name), "None")]
    parsed = parse(words)
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


def _check_names(names: Iterable[str], where: str) -> None:
    unknown = [name for name in names if name not in OPTION_TYPES]
    if unknown:
        guesses = [f"{name}: {guess}" for name in unknown if (guess := suggestion(name, OPTION_TYPES)) is not None]
        raise ConfigError(
            f"{where}: {'unknown options' if len(unknown) > 1 else 'unknown option'} {', '.join(unknown)}",
            "the names of the flags, with underscores (megatron-patch pretrain --help lists them)",
            "; ".join(guesses) or f"remove {plural(len(unknown), 'name')}",
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as a YAML file would have them."""
    plain = {name: _plain_value(name, value) for name, value in values.items()}
    for name, value in plain.items():
        if name == "stages":
            continue
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and word.startswith("--"):
                raise ConfigError(f"{name}={word!r} begins with --, like a flag", "a value", f"give the value of {name}")
    return plain


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        # A list, because a text of several words would be several paths.
        return [os.fspath(value)] if name in ("data_path", "valid_data_path") else os.fspath(value)
    if isinstance(value, (tuple, list)):
        return [_plain_value("", item) if name != "stages" else item for item in value]
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)  # 4e9 tokens
    return value
