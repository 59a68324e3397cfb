"""The section `study` of a configuration, which only a study reads. In: its value in the file. Out: the section, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError


def study_section(path: Path, section: Any) -> dict[str, Any]:
    """Returns the section `study` of a configuration, which only a study reads.

    Its keys are `arms`, a list of names, the most valuable first; `optimizers`, tuned options by optimizer; and `vocab-size`.

    Args:
        path: of the configuration, for errors.
        section: its value; None without one.

    Raises:
        ConfigError: a key or a value is wrong.
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
    return dict(given)
