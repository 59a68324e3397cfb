"""The section `study` of a configuration, which only a study reads. In: its value in the file. Out: the section, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.replication.arms import FIXED_OPTIONS, is_learning_rate
from megatron_patch.utils.registry import suggestion


def study_section(path: Path, section: Any) -> dict[str, Any]:
    """Returns the section with its keys checked; {} without one.

    Its keys are `arms`, a list of names, the most valuable first; `optimizers`, tuned options by optimizer; and `vocab-size`.

    Args:
        path: of the configuration, for errors.
        section: its value; None without one.

    Raises:
        ConfigError: keys or values are wrong; the error names all wrong options of optimizers.
    """
    kinds = {"arms": list, "optimizers": dict, "vocab-size": (int, str)}
    given = {} if section is None else section
    wrong = not isinstance(given, dict) or any(not isinstance(value, kinds.get(key, ())) for key, value in given.items())  # type: ignore[arg-type]
    options = [] if wrong else given.get("optimizers", {}).values()
    if wrong or not all(isinstance(name, str) for name in given.get("arms", ())) or not all(isinstance(value, dict) for value in options):
        raise ConfigError(
            f"{path}: study is {section!r}"[:300],
            "arms: a list of names; optimizers: a mapping such as {adamw: {lr: 8e-3}, muon: {lr: 1.6e-2}}; vocab-size: a number",
            "correct the section",
        )
    problems = _wrong_options(given.get("optimizers", {}))
    if problems:
        raise ConfigError(
            f"{path}, optimizers of the section study: {'; '.join(problems)}",
            f"optimizers: {', '.join(OPTIMIZERS)}; lr: a number above 0; any other option of the training program except "
            f"{', '.join(FIXED_OPTIONS)}",
            "correct the section",
        )
    return dict(given)


def _wrong_options(optimizers: Mapping[Any, Mapping[Any, Any]]) -> list[str]:
    """Returns a phrase for each wrong name, option and value of the optimizers."""
    problems = []
    for optimizer, options in optimizers.items():
        if optimizer not in OPTIMIZERS:
            hint = suggestion(str(optimizer), OPTIMIZERS)
            problems.append(f"{optimizer} is not an optimizer{f', {hint}' if hint else ''}")
        for option, value in options.items():
            name = str(option).replace("_", "-")
            if name in FIXED_OPTIONS:
                problems.append(f"{optimizer} has {option}, which must be the same in all arms")
            elif name == "lr" and not is_learning_rate(value):
                problems.append(f"{option} of {optimizer} is {value!r}")
            elif isinstance(value, (list, dict)):
                problems.append(f"{option} of {optimizer} is {value!r}, which is not one value"[:200])
    return problems
