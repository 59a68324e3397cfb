"""Completion in a shell: bash itself is asked, as a user would with the tab key."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess

import pytest

from megatron_patch.cli import completion
from megatron_patch.cli.completion import bash_script, commands, fish_script, zsh_script
from megatron_patch.cli.program import SUBCOMMANDS
from megatron_patch.config.values import KINDS
from megatron_patch.errors import ConfigError
from megatron_patch.programs import TOOLS

ASK = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _megatron_patch; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def found():
    return commands()


@pytest.fixture(scope="module")
def script(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "megatron-patch.bash"
    path.write_text(bash_script(found))
    return path


def ask(script, *words):
    """Returns what bash's function offers for the last of the words."""
    run = subprocess.run(["bash", "--norc", "-c", f'source "$0"; {ASK}', str(script), *words], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["megatron-patch", "pl"], ["plan", "plot"]),
        (["megatron-patch", "pretrain", "--zero-s"], ["--zero-stage"]),
        (["megatron-patch", "pretrain", "--zero-stage", ""], ["0", "1", "2", "3"]),
        (["megatron-patch", "pretrain", "--zero-stage", "="], ["0", "1", "2", "3"]),
        (["megatron-patch", "pretrain", "--on-spike", "=", "re"], ["rewind"]),
        (["megatron-patch", "pretrain", "--bf16", "--vers"], ["--version"]),
        (["megatron-patch", "pretrain", "--config", ""], []),
        (["megatron-patch", "convert", "to"], ["to-hf"]),
        (["megatron-patch", "completion", ""], ["bash", "zsh", "fish"]),
        (["megatron-patch", "schema", "--out"], ["--output"]),
        (["megatron-patch", "other", "--lr"], []),
        (["pretrain_gpt_patch.py", "--model-family", "q"], ["qwen3", "qwen3_moe"]),
        (["./pretrain_gpt_patch.py", "--no-bf"], ["--no-bf16"]),
        (["deepspeed", "--num_gpus", "8", "pretrain_gpt_patch.py", "--seed", "1", "--rec"], ["--recipe", "--recompute-granularity"]),
        (["deepspeed", "--module", "megatron_patch.pretrain", "--optim"], ["--optimizer"]),
        (["torchrun", "-m", "megatron_patch", "evaluate", "--loa"], ["--load"]),
        (["deepspeed", "--num"], []),
    ],
)
def test_bash_offers(script, words, offered):
    assert ask(script, *words) == offered


def test_the_tab_key_completes_in_bash(script):
    """In an interactive shell: the line is completed, and then echoed instead of run."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "PS1": "> ", "TERM": "dumb", "HISTFILE": "/dev/null"})
    os.write(terminal, f"source {script}; echo rea''dy\n".encode())
    try:
        read_until(terminal, b"ready")
        os.write(terminal, b"megatron-patch pretrain --on-spike rew\t--zero-s\t3\x01echo DO''NE: \n")
        text = read_until(terminal, b"--zero-stage 3\r\n", after=b"DONE: ")
        assert b"DONE: megatron-patch pretrain --on-spike rewind --zero-stage 3" in text
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(terminal, words, after=b""):
    text = b""
    while words not in text.partition(after)[2] if after else words not in text:
        assert select.select([terminal], [], [], 60)[0], text
        text += os.read(terminal, 1 << 16)
    return text


def test_every_subcommand_and_flag_is_known(found):
    assert [command.name for command in found] == [subcommand.name for subcommand in SUBCOMMANDS]
    flags = {command.name: set(command.flags) for command in found}
    training = {f"--{name.replace('_', '-')}" for name in KINDS} - {"--local-rank"}
    assert training <= flags["pretrain"] and training <= flags["plan"] and {"--config", "--help", "--no-bf16"} <= flags["pretrain"]
    assert "--output-prefix" in flags["preprocess"] and "--verify" in flags["convert"] and "--gpu" in flags["plan"]


@pytest.mark.parametrize("make", [zsh_script, fish_script])
def test_scripts_for_other_shells_have_every_flag(found, make):
    text = make(found)
    for command in found:
        assert command.name in text
    for name in KINDS.keys() - {"local_rank"}:
        assert name.replace("_", "-") in text
    assert ("bashcompinit" in text) == (make is zsh_script)
    assert all(f"{tool}.py" in text for tool, name in TOOLS.items() if name in {command.name for command in found if command.flags})


def test_the_program_prints_the_script(capsys, found):
    completion.main(["bash"])
    assert capsys.readouterr().out == bash_script(found)
    with pytest.raises(ConfigError, match="invalid choice: 'tcsh'"):
        completion.main(["tcsh"])
