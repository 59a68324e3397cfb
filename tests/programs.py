"""Runs a program of the checkout in a process of its own that is forked from the server of `tests/distributed/ranks.py`.

The server has imported torch and DeepSpeed, which takes longer than most programs that tests start. A test of a start itself, of imports, or
of a program that must not import them starts a real interpreter instead.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.distributed.ranks import start_server


def _run(words: Sequence[str], cwd: str, environment: Mapping[str, str], streams: Sequence[str]) -> None:
    for descriptor, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, flags | (os.O_APPEND if descriptor else 0))
        os.dup2(opened, descriptor)
        os.close(opened)
    # Buffered as in a new process whose streams are files.
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, encoding="utf-8", closefd=False),
        open(1, "w", encoding="utf-8", closefd=False),
        open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False),
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()


def run_program(
    *words: Any, cwd: Path, environment: Mapping[str, str] | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script with its arguments and returns its exit code and what it printed, as `subprocess.run` does.

    Args:
        words: path of the script, from `cwd`, or "-m" and a module, then its arguments.
        cwd: working folder.
        environment: all variables; None stands for those of this process.
        text: standard input.
    """
    context = start_server()
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("stdin", "stdout", "stderr")]
        for path, content in zip(streams, (text or "", "", ""), strict=True):
            Path(path).write_text(content, encoding="utf-8")
        given = [str(word) for word in words]
        process = context.Process(target=_run, args=(given, str(cwd), dict(environment or os.environ), streams))
        process.start()
        process.join()
        printed = [Path(path).read_text(encoding="utf-8") for path in streams[1:]]
    return subprocess.CompletedProcess(given, process.exitcode, *printed)
