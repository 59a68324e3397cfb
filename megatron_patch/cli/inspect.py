"""Shows what is in a dataset or in a run's checkpoints, by what PATH is.

A folder is shown as `megatron-patch inspect-checkpoint` does, anything else as `megatron-patch inspect-dataset` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_patch.cli import inspect_checkpoint, inspect_dataset
from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.data.storage import exists, is_address
from megatron_patch.errors import ConfigError


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        ConfigError: a flag is wrong, or PATH is neither a dataset nor a folder.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="PATH", help="a dataset prefix (without .idx), a run's folder or one of its step-N folders")
    dataset, checkpoints = parser.add_argument_group("flags for a dataset"), parser.add_argument_group("flags for checkpoints")
    inspect_dataset.add_flags(dataset)
    inspect_checkpoint.add_flags(checkpoints)
    path = parser.parse_args(argv).path
    found = _has_checkpoints(path)
    own, other = (_names(group) for group in ((checkpoints, dataset) if found else (dataset, checkpoints)))
    for flag in (word.partition("=")[0] for word in argv):
        if flag in other:
            raise ConfigError(
                f"{flag} does not apply to {path}, which is {'a folder of checkpoints' if found else 'a dataset'}",
                ", ".join(own),
                f"remove {flag}, or check the path",
            )
    (inspect_checkpoint if found else inspect_dataset).main(argv)


def _names(group: argparse._ArgumentGroup) -> list[str]:
    return [name for action in group._group_actions for name in action.option_strings]


def _has_checkpoints(path: str) -> bool:
    """Returns whether a path is to be read as the folder of a run, and not as the prefix of a dataset."""
    if is_address(path) or path.endswith((".bin", ".idx")):
        return False
    folder, is_dataset = Path(path), exists(f"{path}.idx") or exists(f"{path}.bin")
    if folder.is_dir():
        return not is_dataset or any(folder.glob("step-*"))
    if not is_dataset:
        raise ConfigError(
            f"{path} is neither a dataset nor a folder: there is no {path}.idx",
            "a dataset prefix (the path without .bin and .idx), or the folder that --save named",
            "check the path",
        )
    return False
