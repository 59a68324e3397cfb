"""Prints a script that completes subcommands, flags and their values in a shell.

bash:  source <(megatron-patch completion bash)
zsh:   source <(megatron-patch completion zsh)
fish:  megatron-patch completion fish | source

Write the line into ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish. The
script also completes pretrain_gpt_patch.py and the files of tools/, alone and
after deepspeed or torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import mock

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.cli.program import NAME, SUBCOMMANDS, Subcommand
from megatron_patch.config.help_texts import first_sentence, help_texts
from megatron_patch.config.stage_spec import RECIPES
from megatron_patch.config.values import KINDS, Form
from megatron_patch.model.families import FAMILIES
from megatron_patch.programs import TOOLS
from megatron_patch.utils.console import for_terminal

LAUNCHERS = ("deepspeed", "torchrun")


@dataclass(frozen=True)
class Flag:
    """A flag of a subcommand.

    Args:
        values: what may follow it; None: nothing; (): anything, for which the shell offers files.
        text: its meaning, in a few words.
    """

    values: tuple[str, ...] | None
    text: str


@dataclass
class Command:
    """A subcommand.

    Args:
        name: its name.
        text: what it does, in a few words.
        words: words that may follow it, such as to-hf.
        flags: its flags.
    """

    name: str
    text: str
    words: list[str] = field(default_factory=list)
    flags: dict[str, Flag] = field(default_factory=dict)


class _Found(BaseException):
    """Carries a parser out of the program that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _interrupt(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
    raise _Found(parser)


def _parser(module: str) -> argparse.ArgumentParser:
    """Returns the parser that a tool makes before it does anything else."""
    main = importlib.import_module(module).main
    with mock.patch.multiple(ArgumentParser, parse_args=_interrupt, parse_known_args=_interrupt):
        try:
            main([])
        except _Found as found:
            return found.parser
    raise AssertionError(f"{module} parses no arguments")


def _add_parser(command: Command, parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            command.words += list(action.choices)
            for part in action.choices.values():
                _add_parser(command, part)
        elif action.help != argparse.SUPPRESS:
            values = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
            command.flags |= dict.fromkeys(action.option_strings, Flag(values, first_sentence(str(action.help or ""))))


def _training_flags() -> dict[str, Flag]:
    """Returns the flags of the training program."""
    named = {"model_family": tuple(FAMILIES), "recipe": tuple(RECIPES)}
    flags = {
        "--config": Flag((), "YAML file of options"),
        "--help": Flag(None, "list all flags"),
        "--version": Flag(None, "print versions"),
    }
    for name, kind in KINDS.items():
        flag, text = name.replace("_", "-"), first_sentence(help_texts()[name])
        switch = kind.form is Form.SWITCH
        flags[f"--{flag}"] = Flag(None if switch else named.get(name) or tuple(map(str, kind.choices)), text)
        if switch:
            flags[f"--no-{flag}"] = Flag(None, f"Not: {text}")
    del flags["--local-rank"]
    return flags


def commands() -> list[Command]:
    """Returns all subcommands with their flags; imports the modules of all of them."""
    return [_command(subcommand) for subcommand in SUBCOMMANDS]


def _command(subcommand: Subcommand) -> Command:
    command = Command(subcommand.name, subcommand.summary)
    if subcommand.name == "completion":
        command.words = list(SCRIPTS)
    elif not subcommand.reports:
        # Without the packages that it needs, a subcommand is completed by its name only.
        with contextlib.suppress(ModuleNotFoundError):
            _add_parser(command, _parser(subcommand.module))
    if subcommand.reports or subcommand.name == "plan":
        command.flags = {**_training_flags(), **command.flags}
    return command


def _words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def bash_script(found: list[Command]) -> str:
    """Returns the script for bash."""
    flags = "\n".join(f"    {command.name}) flags={_words([*command.words, *command.flags])} ;;" for command in found)
    values = "\n".join(
        f"    {command.name}:{flag}) values={_words(known.values)} ;;" if known.values else f"    {command.name}:{flag}) any=1 ;;"
        for command in found
        for flag, known in command.flags.items()
        if known.values is not None
    )
    files = {f"{tool}.py": subcommand for tool, subcommand in TOOLS.items() if subcommand in {command.name for command in found}}
    programs = "\n".join(f"      {file}) command={subcommand} ;;" for file, subcommand in files.items())
    return f"""\
# Completion of {NAME} for bash and zsh: source <({NAME} completion bash)
_megatron_patch() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="" command="" flags="" values="" any="" word index
  COMPREPLY=()
  # bash divides --flag=value into three words.
  if [ "$current" = "=" ]; then
    current="" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  elif [ "$COMP_CWORD" -gt 1 ] && [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ]; then
    previous="${{COMP_WORDS[COMP_CWORD-2]}}"
  elif [ "$COMP_CWORD" -gt 0 ]; then
    previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  fi
  for ((index = 0; index < COMP_CWORD; index++)); do
    word="${{COMP_WORDS[index]}}"
    case "${{word##*/}}" in
{programs}
      {NAME}|megatron_patch|megatron_patch.pretrain)
        if [ "$word" = megatron_patch.pretrain ]; then
          command=pretrain
        elif [ "$((index + 1))" -eq "$COMP_CWORD" ]; then
          COMPREPLY=($(compgen -W {_words([*(command.name for command in found), "--help", "--version"])} -- "$current"))
          return
        else
          command="${{COMP_WORDS[index+1]}}"
        fi ;;
    esac
    [ -n "$command" ] && break
  done
  case "$command" in
{flags}
    *) return ;;
  esac
  case "$command:$previous" in
{values}
  esac
  if [ -n "$values" ]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [ -z "$any" ]; then
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
  fi
}}
# Without an answer of the function, the shell completes names of files.
complete -o bashdefault -o default -F _megatron_patch {NAME} {" ".join([*files, *LAUNCHERS])}
"""


def zsh_script(found: list[Command]) -> str:
    """Returns the script for zsh, which runs that for bash."""
    return f"autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n{bash_script(found)}"


def fish_script(found: list[Command]) -> str:
    """Returns the script for fish."""
    lines = [f"# Completion of {NAME} for fish: {NAME} completion fish | source"]
    known = " ".join(command.name for command in found)
    for command in found:
        lines.append(f"complete -c {NAME} -f -n 'not __fish_seen_subcommand_from {known}' -a {command.name} -d {_fish(command.text)}")
    files = {subcommand: f"{tool}.py" for tool, subcommand in TOOLS.items()}
    for command in found:
        programs = [(NAME, f" -n '__fish_seen_subcommand_from {command.name}'")]
        programs += [(files[command.name], "")] if command.name in files else []
        for program, condition in programs:
            lines += [f"complete -c {program} -f{condition} -a {word}" for word in command.words]
            for flag, meaning in command.flags.items():
                name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                value = "" if meaning.values is None else f" -x -a {_fish(' '.join(meaning.values))}" if meaning.values else " -r -F"
                lines.append(f"complete -c {program}{condition} {name}{value} -d {_fish(meaning.text)}")
    return "\n".join(lines) + "\n"


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}


def main(argv: list[str]) -> None:
    """Prints the script for a shell.

    Args:
        argv: the name of the shell: bash, zsh or fish.

    Raises:
        ConfigError: there is no script for the shell.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell")
    args = parser.parse_args(argv)
    print(for_terminal(SCRIPTS[args.shell](commands())), end="")
