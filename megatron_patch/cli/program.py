"""The installed command: `megatron-patch SUBCOMMAND …`, also `python -m megatron_patch SUBCOMMAND …`.

In: the command line. Out: the subcommand's output and exit code. Each subcommand is a module with `main(argv)`, which is imported only if
it is called, so that `--help` is quick and a missing package stops only what needs it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.programs import set_command
from megatron_patch.requirements import check_required
from megatron_patch.utils.pipes import reader_may_leave
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.spelling import accept_all_text
from megatron_patch.utils.versions import versions

NAME = "megatron-patch"


@dataclass(frozen=True)
class Subcommand:
    """A subcommand.

    Args:
        name: its name.
        module: the module whose `main(argv)` runs it.
        summary: what it does, in one line.
        reports: `main` handles its errors and returns the exit code; otherwise `run_tool` does.
    """

    name: str
    module: str
    summary: str
    reports: bool = False


SUBCOMMANDS = (
    Subcommand("pretrain", "megatron_patch.training.pretrain", "train: patches first, single tokens last", reports=True),
    Subcommand("preprocess", "megatron_patch.cli.preprocess_data", "convert text to datasets"),
    Subcommand("merge", "megatron_patch.cli.merge_datasets", "merge datasets"),
    Subcommand("train-tokenizer", "megatron_patch.cli.train_tokenizer", "train a tokenizer on text"),
    Subcommand("inspect", "megatron_patch.cli.inspect", "show what is in a dataset or in a run's checkpoints"),
    Subcommand("inspect-dataset", "megatron_patch.cli.inspect_dataset", "show what is in a dataset"),
    Subcommand("inspect-checkpoint", "megatron_patch.cli.inspect_checkpoint", "show a run's checkpoints, and check them"),
    Subcommand("show-step", "megatron_patch.cli.show_step", "show the text that a rejected step read"),
    Subcommand("plan", "megatron_patch.cli.plan", "predict memory, time and cost of a run"),
    Subcommand("evaluate", "megatron_patch.cli.evaluate", "evaluate a checkpoint on data or tasks"),
    Subcommand("generate", "megatron_patch.cli.generate", "continue prompts with a checkpoint"),
    Subcommand("convert", "megatron_patch.cli.convert_checkpoint", "convert checkpoints to and from other formats"),
    Subcommand("report", "megatron_patch.cli.report", "write an HTML report about runs"),
    Subcommand("plot", "megatron_patch.cli.plot", "plot the held-out loss of runs"),
    Subcommand("study", "megatron_patch.cli.study", "compare ways of training at equal cost"),
    Subcommand("compare-studies", "megatron_patch.cli.compare_studies", "compare the results of studies"),
    Subcommand("migrate", "megatron_patch.cli.migrate", "turn a Megatron command line into a configuration file"),
    Subcommand("schema", "megatron_patch.cli.schema", "print the JSON schema of configuration files, for editors"),
    Subcommand("completion", "megatron_patch.cli.completion", "print a completion script for a shell"),
    Subcommand("examples", "megatron_patch.cli.examples", "copy example configurations and Slurm templates"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code.

    Args:
        argv: the subcommand and its arguments; None: those of this process.
    """
    accept_all_text()
    words = list(sys.argv[1:] if argv is None else argv)
    # deepspeed puts its --local_rank before the arguments; the environment has the number too.
    if words and words[0].startswith(("--local_rank=", "--local-rank=")):
        words = words[1:]
    try:
        if words and words[0] in ("-h", "--help"):
            return _print(usage())
        if words and words[0] == "--version":
            return _print(versions())
        if not words:
            print(usage(), file=sys.stderr)
            return ExitCode.CONFIG
        subcommand = find(words[0])
        if (error := check_required()) is not None:
            raise error
    except ConfigError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    set_command(f"{_name()} {subcommand.name}")
    if subcommand.reports:
        return int(importlib.import_module(subcommand.module).main(words[1:]))
    from megatron_patch.cli.command_line import run_tool

    return run_tool(lambda arguments: importlib.import_module(subcommand.module).main(arguments), words[1:])


def find(name: str) -> Subcommand:
    """Returns the subcommand of a name.

    Raises:
        ConfigError: there is none.
    """
    known = {subcommand.name: subcommand for subcommand in SUBCOMMANDS}
    if name in known:
        return known[name]
    if name.startswith("-"):
        raise ConfigError(
            f"{name if name.isprintable() else ascii(name)} precedes the subcommand",
            "--help and --version, or a subcommand first",
            f"write {NAME} SUBCOMMAND {name} …; to train: {NAME} pretrain {name} …",
        )
    raise ConfigError(
        f"{NAME} has no subcommand {name[:80]!r}", ", ".join(known), suggestion(name, known) or f"choose one of them; see {NAME} --help"
    )


def usage() -> str:
    """Returns the text of `--help`."""
    width = max(len(subcommand.name) for subcommand in SUBCOMMANDS)
    lines = [f"  {subcommand.name:{width}}  {subcommand.summary}" for subcommand in SUBCOMMANDS]
    return "\n".join(
        [
            f"usage: {_name()} SUBCOMMAND [arguments]",
            "",
            "Pretrains language models on patches of tokens first, on single tokens last.",
            "",
            *lines,
            "",
            f"  {'--version':{width}}  print the versions of {NAME}, torch and DeepSpeed",
            "",
            f"{_name()} SUBCOMMAND --help lists the flags of a subcommand.",
            "On several GPUs: deepspeed --num_gpus 8 --module megatron_patch.pretrain …",
        ]
    )


def _name() -> str:
    """Returns how the user called this program."""
    return "python -m megatron_patch" if Path(sys.argv[0]).parts[-2:] == ("megatron_patch", "__main__.py") else NAME


def _print(text: str) -> ExitCode:
    with reader_may_leave():
        print(text)
    return ExitCode.DONE
