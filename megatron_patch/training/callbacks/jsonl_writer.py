"""Appends JSON lines to a file; lines that a full disk refuses are kept in memory and written later.

In: plain values. Out: lines. A refused line must not end a run on a thousand GPUs; a full disk surfaces at the next checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.training.faults.exit_protocol import print_stderr
from megatron_patch.utils.files import open_descriptor
from megatron_patch.utils.units import plural

_LARGEST_BACKLOG = 1 << 26


class JsonlWriter:
    """Appends to one file, which is created with its folder when the first line is added.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._waiting = b""
        self._refused = False

    def add(self, values: Any) -> None:
        """Appends a line.

        Args:
            values: plain JSON values.

        Raises:
            CheckpointError: the disk refuses lines, and more than 64 MiB of them are waiting.
        """
        self._waiting += json.dumps(values).encode() + b"\n"
        error = self._write()
        if error is None:
            if self._refused:
                print_stderr(f"{self._path} can be written again; no line was lost")
            self._refused = False
        elif len(self._waiting) > _LARGEST_BACKLOG:
            raise CheckpointError(f"cannot write {self._path}: {error}", "a folder with free space", "free space, then restart the run")
        elif not self._refused:
            self._refused = True
            print_stderr(
                f"cannot write {self._path}: {error}; its lines wait in memory, training continues; free space before the next checkpoint"
            )

    def _write(self) -> str | None:
        """Writes as many waiting lines as possible; returns the error that stopped it, or None."""
        try:
            if self._file is None:
                self._file = self._open()
            # A write may end in the middle of a line; the next one continues there.
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open_descriptor(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            self._waiting = b"\n" + self._waiting  # ends the incomplete line that a kill left
        return file

    def close(self) -> None:
        """Tries once more to write the waiting lines, and closes the file."""
        if self._waiting and (error := self._write()) is not None:
            lost = self._waiting.count(b"\n")
            print_stderr(f"cannot write {self._path}: {error}; {plural(lost, 'line')} lost")
        self._waiting = b""
        if self._file is not None:
            os.close(self._file)
            self._file = None
