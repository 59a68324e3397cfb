"""Predicts the memory, time and cost of a run before it starts. In: a run and the hardware. Out: `planning.plan.Plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_patch.api.arguments import whole
from megatron_patch.api.configuration import Source, load_config
from megatron_patch.config.parsing import ParsedOptions
from megatron_patch.config.resolve import RunConfig, resolve
from megatron_patch.errors import ConfigError
from megatron_patch.planning.hardware import load_hardware
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import Plan, make_plan
from megatron_patch.planning.reliability import Interruptions
from megatron_patch.training.pretrain import make_engine_config

_DEVICES = 8


def plan(
    config: RunConfig | Source,
    *,
    gpu: str = "H100",
    world_size: int | None = None,
    ceilings: str | os.PathLike[str] | None = None,
    interruptions: Interruptions | None = None,
    **options: Any,
) -> Plan:
    """Predicts a run: exact parameters, FLOPs and bytes, and estimated times. Needs neither data nor GPUs.

    Args:
        config: a run, or what `load_config` takes.
        gpu: name of the devices, such as "H100".
        world_size: number of devices; None: the ranks of a resolved run, else 8.
        ceilings: JSON file of your own measurements of the devices.
        interruptions: mean time between failures, and how long a checkpoint and a restart take; None: the defaults of that record.
        options: options as for `load_config`, if `config` is not resolved yet.

    Returns:
        The plan: `fits`, `fullest.memory.total` (bytes of the fullest rank), `run.seconds`, `run.device_hours`, `run.dollars`, `stages`,
        `checkpoints`; `to_json()` has all of it, counted and estimated numbers apart.

    Raises:
        ConfigError: the run, the layout or the hardware is not possible.
    """
    ranks = None if world_size is None else whole("world_size", world_size, 1)
    if not isinstance(gpu, str):
        raise ConfigError(f"gpu={gpu!r}", "the name of a device", 'give a name, such as gpu="H100"')
    if not isinstance(config, RunConfig):
        run = load_config(config, world_size=ranks or _DEVICES, **{"dry_run": True, **options})
    elif options:
        raise ConfigError(
            f"options with a resolved run: {', '.join(options)}",
            "options of load_config",
            "give them to load_config, or give its source here",
        )
    else:
        run = config if ranks is None else resolve(ParsedOptions(config.options, config.origins), ranks)
    device = load_hardware(gpu, None if ceilings is None else Path(ceilings))
    layout, seq_length = layout_of(run, make_engine_config(run)), run.options.stages.seq_length
    return make_plan(run.shape, run.plan, layout, device, seq_length, interruptions or Interruptions())
