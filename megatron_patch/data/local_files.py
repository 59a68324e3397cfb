"""Random access to files on this machine's file systems, of which only some are open at a time.

In: a path. Out: the file's size, and any range of its bytes. A corpus may have tens of thousands of files, and a system allows a process
to open far fewer, often 1,024. So a file that has not been read for long is closed, and opened again when it is read; the path must then
still name the same file. Files are read, not memory-mapped: a truncated file or a failing disk raises an error; with a memory map it would
be SIGBUS.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from megatron_patch.errors import DataError
from megatron_patch.utils.files import LINK_TO_NOTHING, RAISE_OPEN_FILES, allow_open_files, too_many_open_files

_WANTED = 1 << 16
"""Files that a process asks the system to be allowed to open: two for each shard of the largest corpora."""
_OTHERS = 1024
"""Of the files that a process may open, those that are left for connections, libraries and checkpoints, where there are enough."""


class FileReplacedError(DataError):
    """The path of an opened file now names another file, or none, or the file has other content than when it was opened."""


class LocalFile:
    """A file on this machine's file systems.

    Args:
        path: its path.

    Raises:
        DataError: the file does not exist or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._key = next(_KEYS)
        try:
            descriptor = _OPEN_FILES.acquire(self._key, path)
            try:
                found = os.fstat(descriptor)
            finally:
                _OPEN_FILES.release(self._key)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is not a file")
        except OSError as error:
            raise _unreadable(path, error) from error
        self._stamp, self._identity, self._changed = _stamp(found), _identity(found), found.st_ctime_ns
        self.size = found.st_size

    def __del__(self) -> None:
        _OPEN_FILES.close(self._key)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on.

        Raises:
            FileReplacedError: the file was closed in the meantime, and its path now names another file, or none.
            DataError: the file is too short, or cannot be read.
        """
        try:
            descriptor = _OPEN_FILES.acquire(self._key, self.path, self._check)
        except FileNotFoundError as error:
            raise self._replaced("does not exist any more") from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        try:
            self._read(descriptor, start, out)
        finally:
            _OPEN_FILES.release(self._key)

    def _read(self, descriptor: int, start: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(descriptor, [out[done:]], start + done)
            except OSError as error:
                raise DataError(
                    f"cannot read {self.path}: {error.strerror}", "a file system without errors", "check the disk or the network"
                ) from error
            if count == 0:
                raise shorter(self.path, self.size)
            done += count

    def _check(self, descriptor: int) -> None:
        """Checks that a descriptor, with which the file was opened again, belongs to the file that was opened first.

        No program can put back the time at which a file's content or properties changed last. Another mode, owner or link changes it, too,
        so the caller compares the data (`TokenCorpus`). It is compared only here, because some network file systems report the current
        time: then each opening costs a comparison, but not each read.
        """
        found = os.fstat(descriptor)
        if (_stamp(found), _identity(found), found.st_ctime_ns) != (self._stamp, self._identity, self._changed):
            raise self._replaced("is another file than the one that was opened, or has changed since")

    def _replaced(self, how: str) -> FileReplacedError:
        return FileReplacedError(
            f"{self.path} {how}", "files that do not change while they are read", "restore the file, and run the same command again"
        )

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Does nothing: the file is on this machine."""

    def is_current(self) -> bool:
        """Returns whether the path still refers to the opened file.

        It is judged by size, modification time and number of links; while the file is not open, also by whether it is the same file.
        """
        try:
            if (descriptor := _OPEN_FILES.acquire_if_open(self._key)) is not None:
                try:
                    return _stamp(os.fstat(descriptor)) == self._stamp
                finally:
                    _OPEN_FILES.release(self._key)
            found = os.stat(self.path)
            return (_stamp(found), _identity(found)) == (self._stamp, self._identity)
        except OSError:
            return False


def _open(path: str) -> int:
    # Without waiting for the other end of a pipe; a file ignores the flag.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _stamp(found: os.stat_result) -> tuple[int, int, bool]:
    """Returns (size, modification time in ns, whether the file has a name)."""
    return found.st_size, found.st_mtime_ns, found.st_nlink > 0


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def shorter(path: str, size: int) -> DataError:
    """Returns the error for a file that ends before its size."""
    return DataError(
        f"{path} has become shorter than the {size} bytes that it had",
        "files that do not change while they are read",
        "restore the file, and resume from the newest checkpoint",
    )


def _unreadable(path: str, error: OSError) -> DataError:
    if too_many_open_files(error):
        count = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return DataError(
            f"cannot open {path}: {error.strerror}; this process may have {count:,}",
            "at least 256 open files for each process",
            RAISE_OPEN_FILES,
        )
    dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
    return DataError(
        f"cannot read {path}: {LINK_TO_NOTHING if dangling else error.strerror}",
        "a file that this user can read",
        "check the path and its permissions",
    )


class _OpenFiles:
    """The descriptors of the files that were read last, for all threads. No file is closed while a thread reads from it."""

    def __init__(self) -> None:
        # Reentrant, because Python may delete a LocalFile, which closes its descriptor, at any point.
        self._lock = threading.RLock()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._readers: dict[int, int] = {}
        self._most = 0
        os.register_at_fork(before=lambda: self._lock.acquire(), after_in_parent=lambda: self._lock.release(), after_in_child=self._forked)

    def _forked(self) -> None:
        """In a child process, which has its own copies of the descriptors, but none of the threads that were reading."""
        self._lock = threading.RLock()
        self._readers = {}

    def acquire(self, key: int, path: str, check: Callable[[int], None] | None = None) -> int:
        """Returns the descriptor of a file, which stays open until `release`.

        Args:
            key: number of the file.
            path: what to open if the file is not open.
            check: called with the descriptor if the file was not open; raises an error if it is not the file.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is None:
                self._close_unused(self._limit() - 1)
                descriptor = self._opened(path)
                try:
                    if check is not None:
                        check(descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                self._open[key] = descriptor
            else:
                self._open.move_to_end(key)
            self._readers[key] = self._readers.get(key, 0) + 1
            return descriptor

    def acquire_if_open(self, key: int) -> int | None:
        """Returns the descriptor of a file, which stays open until `release`; None if the file is not open."""
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is not None:
                self._readers[key] = self._readers.get(key, 0) + 1
            return descriptor

    def release(self, key: int) -> None:
        """Ends the use of a descriptor that `acquire` or `acquire_if_open` returned."""
        with self._lock:
            left = self._readers.get(key, 0) - 1
            if left > 0:
                self._readers[key] = left
            else:
                self._readers.pop(key, None)

    def close(self, key: int) -> None:
        """Closes a file if it is open."""
        with self._lock:
            descriptor = self._open.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)

    def _limit(self) -> int:
        """Returns the most files that stay open. At the first use the process' limit is raised, where the system allows it."""
        if not self._most:
            allow_open_files(_WANTED)
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            self._most = _WANTED if soft == resource.RLIM_INFINITY else max(8, soft // 4, soft - _OTHERS)
        return self._most

    def _opened(self, path: str) -> int:
        try:
            return _open(path)
        except OSError as error:
            # The rest of the process has opened more files than were left for it.
            if not too_many_open_files(error) or not self._open:
                raise
            self._most = max(1, len(self._open) // 2)
            self._close_unused(self._most)
            return _open(path)

    def _close_unused(self, most: int) -> None:
        """Closes the files that were not read for longest, except those that are being read, until at most `most` are open."""
        unused = (key for key in self._open if key not in self._readers)
        for key in list(itertools.islice(unused, max(0, len(self._open) - most))):
            self.close(key)


_KEYS = itertools.count()
_OPEN_FILES = _OpenFiles()
