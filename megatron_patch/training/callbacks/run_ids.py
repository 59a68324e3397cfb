"""Remembers under which id a service knows the run, so that a resumed run continues there.

In: the run's folder. Out: SAVE/wandb_run_id, SAVE/mlflow_run_id.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from megatron_patch.utils.files import make_folder, read_small, write_durably

_ID = re.compile("[A-Za-z0-9_-]{1,64}")
_LONGEST_ID = 1000


def new_id() -> str:
    """Returns an id that no other run has."""
    return uuid.uuid4().hex[:12]


def read_id(path: Path) -> str | None:
    """Returns the id in a file, or None if there is none: it becomes part of addresses and paths, so that other text is no id."""
    try:
        found = read_small(path, _LONGEST_ID).decode().strip()
    except (OSError, ValueError):
        return None
    return found if _ID.fullmatch(found) else None


def write_id(path: Path, run_id: str) -> None:
    """Writes an id, in place of whatever has the name of the file."""
    make_folder(path.parent)
    write_durably(path, run_id + "\n")
