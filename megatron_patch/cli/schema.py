"""Prints the JSON schema of configuration files.

With it, editors complete and check the keys and values of --config FILE.yaml.

megatron-patch schema --output megatron_patch.schema.json

and as the first line of the file:

# yaml-language-server: $schema=megatron_patch.schema.json
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.config.schema import config_schema
from megatron_patch.errors import ConfigError
from megatron_patch.utils.console import for_terminal
from megatron_patch.utils.files import reason


def main(argv: list[str]) -> None:
    """Prints the schema, or writes it into a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="file to write; by default standard output")
    args = parser.parse_args(argv)
    text = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    if args.output is None:
        print(for_terminal(text), end="")
        return
    try:
        Path(args.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {args.output}: {reason(error)}", "a file that can be written", "give another path") from error
