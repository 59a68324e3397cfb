"""What the tools share: a parser that suggests the nearest flag, types of arguments, and errors with an exit code."""

from __future__ import annotations

import argparse
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_patch.config.checks import check_text
from megatron_patch.credentials import without_credentials
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.programs import as_called, command
from megatron_patch.requirements import explained_imports
from megatron_patch.utils.console import print_lines
from megatron_patch.utils.files import deny_writing_by_everybody
from megatron_patch.utils.pipes import reader_may_leave
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.spelling import accept_all_text
from megatron_patch.utils.units import parse_count


def count(word: str) -> int:
    """Returns the whole number of an argument such as 4096, 10k or 2M; for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: the word is not a whole number.
    """
    try:
        return parse_count(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.what} (allowed: {error.allowed})") from error


def count_from_one(word: str) -> int:
    """Returns the same as `count` for numbers from 1.

    Raises:
        argparse.ArgumentTypeError: the word is not a whole number from 1.
    """
    number = count(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} (allowed: whole numbers from 1)")
    return number


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of commands and lists in a description, and fits its prose into the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [
            textwrap.fill(part, min(width, 100), initial_indent=indent, subsequent_indent=indent)
            if self._is_prose(part)
            else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        ]
        return "\n\n".join(parts)

    @staticmethod
    def _is_prose(paragraph: str) -> bool:
        commands = ("python ", "deepspeed ", "megatron-patch ")
        return not any("  " in line or line.startswith((" ", *commands)) for line in paragraph.strip().splitlines())


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that suggests the nearest flag, does not accept abbreviated flags, and shows the command that the user called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"prog": command(), **options, "formatter_class": _HelpFormatter})
        self.description = as_called(self.description) if self.description else None

    def error(self, message: str) -> NoReturn:
        """Raises the error that argparse would print, so that all tools report errors in the same way.

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
    """Adds the flags of a tool that several ranks run together: `deepspeed tools/NAME.py --tensor-model-parallel-size 8 …`."""
    layout = parser.add_argument_group(
        "ranks", "For a model that does not fit on one GPU. Start the tool with\ndeepspeed, torchrun or srun."
    )
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="RANKS", help="number of ranks that split each layer")
    layout.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, metavar="RANKS", help="number of ranks that split the list of layers"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run_tool(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a tool's main, prints its error, if any, and returns the exit code.

    An error in flags is the same on all ranks, so only rank 0 prints it. Every rank prints other errors, because a file may be missing
    only on its node.

    Args:
        main: the tool's main.
        argv: its arguments; None: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    deny_writing_by_everybody()
    accept_all_text()
    try:
        rank, _, _ = ranks_from_environment()
        check_text(arguments)
        with reader_may_leave(), explained_imports():
            main(arguments)
    except MegatronPatchError as error:
        if rank == 0 or not isinstance(error, ConfigError):
            name = ConfigError.__name__ if isinstance(error, ConfigError) else type(error).__name__
            print_lines(f"{f'rank {rank}: ' if rank else ''}{name}: {error}", stderr=True)
        return error.exit_code
    except Exception as error:
        # Python's own traceback would repeat what a library puts into its message.
        print_lines(without_credentials("".join(traceback.format_exception(error)).rstrip()), stderr=True)
        return ExitCode.INTERNAL
    return 0
