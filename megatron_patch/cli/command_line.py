"""What the tools share: arguments whose unknown flags get a suggestion, and errors in three parts with an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.units import parse_count


def count(word: str) -> int:
    """A whole number with an optional unit, as the type of an argument: 4096, 10k, 2M.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return parse_count(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.what} (allowed: {error.allowed})") from error


def count_from_one(word: str) -> int:
    """The same from 1.

    Raises:
        argparse.ArgumentTypeError: it is 0, or no count.
    """
    number = count(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} (allowed: whole numbers from 1)")
    return number


class ArgumentParser(argparse.ArgumentParser):
    """argparse that suggests the nearest flag and does not accept beginnings of flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting.

        Raises:
            ConfigError: always.
        """
        do = "see --help"
        if message.startswith("unrecognized arguments:"):
            known = [flag for action in self._actions for flag in action.option_strings]
            unknown = next((word for word in message.split() if word.startswith("--")), "")
            do = suggestion(unknown.partition("=")[0], known) or do
        raise ConfigError(message, "the flags that --help lists", do)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Flags of a tool that ranks of a job may run together: `deepspeed tools/NAME.py --tensor-model-parallel-size 8 …`."""
    layout = parser.add_argument_group("ranks", "for a model that one GPU does not hold; started with deepspeed, torchrun or srun")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="ranks that share the list of layers")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run_tool(main: Callable[[list[str]], None]) -> int:
    """Runs a tool's main with the command line's arguments and turns its errors into a message and an exit code.

    Every rank of a job meets an error in flags; of another one each says what it found, as files may be missing on its node alone.
    """
    rank = 0
    try:
        rank, _, _ = ranks_from_environment()
        main(sys.argv[1:])
    except MegatronPatchError as error:
        if rank == 0 or not isinstance(error, ConfigError):
            print(f"{f'rank {rank}: ' if rank else ''}{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    return 0
