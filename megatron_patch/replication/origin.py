"""Which program trained a run, and on what devices. In: the folder of a run, at each start. Out: words for its record."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from megatron_patch import __version__
from megatron_patch.programs import HOME, in_checkout
from megatron_patch.replication.devices import machine
from megatron_patch.utils.files import write_durably

ORIGIN = "trained_by.json"
"""File in the folder of a run: a list of [commit, machine], one entry for each start that differs from the one before."""
UNKNOWN = "unknown"
"""Commit and machine of a run without this file."""


@functools.cache
def program_commit() -> str:
    """Returns the commit of this program, with -dirty if its files differ from it; in an installation, the version."""
    if in_checkout():
        describe = ["git", "-C", str(HOME), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            done = subprocess.run(describe, capture_output=True, text=True, check=False)
        except OSError:
            return __version__
        if not done.returncode:
            return done.stdout.strip()
    return __version__


def note_origin(folder: Path) -> None:
    """Notes commit and machine in the folder of a run that is about to start. A file in the folder's place is left to the run to report."""
    origins, now = _origins(folder), [program_commit(), machine()]
    if now not in origins[-1:] and not folder.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / ORIGIN, json.dumps([*origins, now]) + "\n")


def read_origin(folder: Path) -> tuple[str, str]:
    """Returns the commit and the machine of a run; several are joined by "then", and UNKNOWN stands for what was not noted."""
    origins = _origins(folder) or [[UNKNOWN, UNKNOWN]]
    commits, machines = (", then ".join(dict.fromkeys(words)) for words in zip(*origins, strict=True))
    return commits, machines


def _origins(folder: Path) -> list[list[str]]:
    """Returns the content of the file ORIGIN; [] if there is none or it is damaged."""
    try:
        noted = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return [[str(commit), str(where)] for commit, where in noted]
    except (OSError, ValueError, TypeError):
        return []
