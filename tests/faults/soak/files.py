"""Faults of files and file systems in the soak test: damaged checkpoints, wrong times, a small file system that is filled.

In: the folder of a run. Out: words that say what was done.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_patch.checkpoint import commit

_DISK = "8m"
JUMPS = [sign * seconds for seconds in (30.0, 3600.0, 86400.0, 31536000.0) for sign in (-1, 1)]
"""Seconds by which clocks and times of files are moved."""


def span(seconds: float) -> str:
    """Returns a jump in words: 3600.0 -> "+1 h"."""
    names = {30.0: "30 s", 3600.0: "1 h", 86400.0: "1 day", 31536000.0: "1 year"}
    return f"{'+' if seconds > 0 else '-'}{names[abs(seconds)]}"


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    """Truncates a file at a random byte."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def damage(save: Path, draw: random.Random) -> str | None:
    """Damages the newest valid checkpoint in one of the ways of disks and users; returns what it did, or None without a checkpoint.

    At least one valid checkpoint is left, because no program can survive the loss of all.
    """
    valid = [folder for folder in commit.list_checkpoints(save) if not commit.verify(folder)]
    latest = save / "latest"
    kinds = (["flip", "truncate", "remove", "manifest"] * 2 if len(valid) > 1 else []) + (["latest"] if latest.exists() else [])
    if not kinds:
        return None
    kind = draw.choice(kinds)
    if kind == "latest":
        draw.choice([latest.unlink, lambda: latest.write_text("step-"), lambda: latest.write_bytes(b"\xff\x00")])()
        return "latest damaged"
    file = draw.choice([path for path in valid[0].rglob("*") if path.is_file()])
    name = f"{valid[0].name.replace('step-0000', 'step-')}/{file.name[:13]}"
    if kind == "manifest":
        (valid[0] / commit.MANIFEST).unlink()
        return f"manifest of {valid[0].name} removed"
    {"flip": lambda: flip(file, draw), "truncate": lambda: truncate(file, draw), "remove": file.unlink}[kind]()
    return {"flip": "bit flipped in", "truncate": "truncated", "remove": "removed"}[kind] + f" {name}"


def move_times(save: Path, draw: random.Random) -> str:
    """Moves the times of all files in a run's folder, also of its lock, into the future or the past; returns what it did."""
    seconds = draw.choice(JUMPS)
    for path in [*save.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # a running job removes files
            os.utime(path, times=(time.time() + seconds, time.time() + seconds), follow_symlinks=False)
    return f"times of all files and of the lock moved by {span(seconds)}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Yields a small file system, or None without the right to mount one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Fills a file system until it has at most `left` bytes."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while (space := os.statvfs(disk)).f_bavail * space.f_frsize > left:
            file.write(bytes(min(space.f_frsize, space.f_bavail * space.f_frsize - left)))


def newest_step(save: Path) -> int:
    """Returns the step of the newest valid checkpoint; 0 without one."""
    found = commit.find_newest_valid(save) if save.exists() else None
    return found.state.step if found else 0
