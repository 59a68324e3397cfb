"""A file of JSON lines that a run adds to. In: plain values. Out: lines; those that a full disk refuses wait for the next ones.

A line that cannot be written is no reason to end a run of a thousand GPUs: whether there is space for what counts, its checkpoint tells.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.training.faults.exit_protocol import print_stderr

_LONGEST = 1 << 26


class JsonlWriter:
    """The file; it is opened, and made with its folder, when the first line comes.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._waiting = b""
        self._refused = False

    def add(self, values: Any) -> None:
        """One line.

        Raises:
            CheckpointError: 64 MiB of lines wait for space.
        """
        self._waiting += json.dumps(values).encode() + b"\n"
        error = self._write()
        if error is None:
            if self._refused:
                print_stderr(f"{self._path} can be written again; no line was lost")
            self._refused = False
        elif len(self._waiting) > _LONGEST:
            raise CheckpointError(f"cannot write {self._path}: {error}", "a folder with free space", "free space and start again")
        elif not self._refused:
            self._refused = True
            print_stderr(f"cannot write {self._path}: {error}; its lines wait, and training goes on: free space before the next checkpoint")

    def _write(self) -> str | None:
        """Writes what waits, as far as that is possible; why not all of it."""
        try:
            if self._file is None:
                self._file = self._open()
            # A write may stop in the middle of a line, behind which the next one goes on.
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            self._waiting = b"\n" + self._waiting  # behind what a kill has left of a line
        return file

    def close(self) -> None:
        """Closes the file, after another try."""
        if self._waiting and (error := self._write()) is not None:
            lost = self._waiting.count(b"\n")
            print_stderr(f"cannot write {self._path}: {error}; {lost} lines are lost")
        self._waiting = b""
        if self._file is not None:
            os.close(self._file)
            self._file = None
