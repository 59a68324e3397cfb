"""Copies examples, Slurm templates and constraints.txt into a folder.

megatron-patch examples FOLDER

The folder then has examples/configs, examples/replicate, examples/slurm and
constraints.txt, as a checkout has them, so that the commands of the
documentation work in it as they are written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.errors import ConfigError
from megatron_patch.programs import shipped, shipped_files
from megatron_patch.utils.console import print_line
from megatron_patch.utils.files import reason


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        ConfigError: a flag is wrong, a file exists that differs, or the folder cannot be written.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write to; it is made if it does not exist")
    args = parser.parse_args(argv)
    home = shipped(".")
    pairs = [(home / name, args.folder / name) for name in shipped_files(home)]
    different = [target for source, target in pairs if target.exists() and target.read_bytes() != source.read_bytes()]
    if different:
        raise ConfigError(
            f"{different[0]} exists and is different", "a folder without files of these names", "move your file, or choose another folder"
        )
    try:
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    except OSError as error:
        raise ConfigError(f"cannot write to {args.folder}: {reason(error)}", "a folder that can be written", "choose another") from error
    print_line(f"wrote {len(pairs)} files into {args.folder}")
