"""Checks of the options of learning rate and optimizer, before a plan exists. In: options. Out: nothing, or an error that names flags."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.config.problems import flag_and_value, one_error, problem_of
from megatron_patch.errors import ConfigError

_UNITS = ("tokens", "steps", "fraction")


def check_lengths(schedule: ScheduleOptions) -> None:
    """Checks that each length of the learning-rate schedule is given in one unit, and that shares are shares.

    Args:
        schedule: the options.

    Raises:
        ConfigError: they are not; the message names all of their flags.
    """
    found: list[ConfigError] = []
    for kind in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        names = [f"{kind}_{unit}" for unit in _UNITS if hasattr(schedule, f"{kind}_{unit}")]
        # A warm-up of 0 tokens is the default.
        given = [flag_of(name) for name in names if getattr(schedule, name) not in ((0, None) if name.endswith("_tokens") else (None,))]
        if len(given) > 1:
            found.append(
                ConfigError(
                    f"{', '.join(given[:-1])} together with {given[-1]}",
                    "one of them",
                    f"keep one; None takes back what a file sets, as {given[0]} None",
                )
            )
    share = schedule.lr_wsd_decay_fraction
    if share is not None and not 0.0 < share <= 1.0:
        found.append(ConfigError(flag_and_value("lr_wsd_decay_fraction", share), "a share above 0 and up to 1", "give 0.1, for example"))
    if found:
        raise one_error([problem_of(error) for error in found])


def check_optimizer(schedule: ScheduleOptions) -> None:
    """Checks that each kind of parameter has a rate that is a multiple of --lr.

    Args:
        schedule: the options.

    Raises:
        ConfigError: a rate is not; the message names all of their flags.
    """
    found: list[ConfigError] = []
    for name in ("muon_lr", "decoupled_lr"):
        rate = getattr(schedule, name)
        if rate is not None and not (schedule.lr > 0 and math.isfinite(rate / schedule.lr) and rate / schedule.lr > 0):
            found.append(
                ConfigError(
                    f"{flag_and_value(name, rate)} with {flag_and_value('lr', schedule.lr)}, of which its schedule is a multiple",
                    "a rate that is a finite multiple of --lr, and --lr above 0",
                    f"give another --lr or {flag_of(name)}",
                )
            )
    if found:
        raise one_error([problem_of(error) for error in found])


def check_muon(schedule: ScheduleOptions, origins: Mapping[str, str]) -> None:
    """Checks that Muon's options are given only where they have an effect; an optimizer of the user's own may read them, too.

    Args:
        schedule: the options.
        origins: name -> "flag" or the path of the file, for those that were given.

    Raises:
        ConfigError: some are given with AdamW; the message says in which file.
    """
    if schedule.optimizer != "adamw":
        return
    given = {name: origin for name, origin in sorted(origins.items()) if name.startswith("muon_")}
    if given:
        flags = ", ".join(flag_of(name) + ("" if origin == "flag" else f" (in {origin})") for name, origin in given.items())
        values = " ".join(f"{flag_of(name)} None" for name, origin in given.items() if origin != "flag")
        raise ConfigError(
            f"{flags} with --optimizer adamw, which does not read {'it' if len(given) == 1 else 'them'}",
            "--optimizer muon",
            f"give --optimizer muon, or remove {'it' if len(given) == 1 else 'them'}"
            + (f"; on the command line, {values} takes back what the file sets" if values else ""),
        )
