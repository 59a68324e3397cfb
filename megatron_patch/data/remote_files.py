"""Random access to files at addresses such as s3://bucket/web.bin, through `fsspec`.

In: an address. Out: the file's size, and any range of its bytes. Whatever goes wrong on the way (the network, the server, the package for
this kind of address) becomes a DataError with the address and the cause.

Chunks are cached on this machine, so that a corpus crosses the network once for all epochs, restarts and ranks. The cache is the folder in
MEGATRON_PATCH_CACHE, by default ~/.cache/megatron_patch. A chunk is written under a temporary name and renamed, so processes may share the
folder. fsspec has caches too, but its block cache writes its list of blocks only when a file is closed: other processes, and a restart
after a crash, would fetch everything again. Its file caches fetch complete files. So fsspec is used for the protocols only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_patch.data.addresses import check_address
from megatron_patch.data.local_files import shorter
from megatron_patch.errors import DataError
from megatron_patch.requirements import how_to_install
from megatron_patch.utils.files import open_new

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.5
_FETCHERS = 32
_MOST_LISTING_BYTES = 1 << 26
# The metadata keys, as file systems name them, that change when a file changes.
_VERSIONS = ("size", "ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime", "created")
# Errors that another attempt cannot remove.
_FINAL = (PermissionError, ImportError, NotImplementedError, TypeError, ValueError)
_FINAL_STATUS = (400, 401, 403, 405)
_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)
_LONGEST_WORDS = 500


class RemoteFile:
    """A file at an address. Its chunks are fetched into the cache when they are first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = _file_system(path)
        self._version = self._current_version()
        self.size = int(self._version["size"])
        name = hashlib.blake2b(f"{path}\x1f{sorted(self._version.items())}".encode(), digest_size=16).hexdigest()
        self._folder = _cache_folder() / name

    def _current_version(self) -> dict[str, str]:
        """Returns the properties that change when the file is replaced.

        Raises:
            DataError: the file does not exist, or its server cannot be reached or does not report the size.
        """
        self._system.invalidate_cache()
        info = self._from_system(lambda: self._system.info(self._inner))
        if info.get("type") not in (None, "file"):
            raise DataError(f"cannot read {self.path}: it is not a file", "the address of a file", "check the address")
        if not isinstance(info.get("size"), int) or info["size"] < 0:
            raise DataError(
                f"{self.path}: the server does not report its size",
                "servers that report the size and support range requests",
                "copy the file to this machine",
            )
        return {name: str(info[name]) for name in _VERSIONS if info.get(name) is not None}

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on, see `storage.RandomAccessFile`."""
        if start + len(out) > self.size:
            raise shorter(self.path, self.size)
        done = 0
        while done < len(out):
            number, inside = divmod(start + done, _CHUNK_BYTES)
            count = min(len(out) - done, _CHUNK_BYTES - inside)
            self._read_chunk(number, inside, out[done : done + count])
            done += count

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetches the missing chunks of some ranges, several at a time."""
        numbers = {n for start, count in ranges for n in range(start // _CHUNK_BYTES, (start + max(count, 1) - 1) // _CHUNK_BYTES + 1)}
        missing = [number for number in sorted(numbers) if not self._path(number).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(_FETCHERS, len(missing))) as pool:
                list(pool.map(self._fetch, missing))

    def is_current(self) -> bool:
        """Returns True: cached chunks never change, and each chunk that is fetched is checked against the version that was opened."""
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number // 1000:06d}" / f"{number % 1000:03d}"

    def _length(self, number: int) -> int:
        return min(_CHUNK_BYTES, self.size - number * _CHUNK_BYTES)

    def _read_chunk(self, number: int, inside: int, out: memoryview) -> None:
        for _ in range(2):
            with contextlib.suppress(OSError), self._path(number).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size == self._length(number) and os.preadv(file.fileno(), [out], inside) == len(out):
                    return
            data = self._fetch(number)
        out[:] = data[inside : inside + len(out)]

    def _fetch(self, number: int) -> bytes:
        """Fetches a chunk, writes it to the cache, and returns it."""
        start, length = number * _CHUNK_BYTES, self._length(number)
        data = self._from_system(lambda: self._range(start, length))
        if len(data) != length:
            raise DataError(
                f"{self.path}: the server sent {'more than the' if len(data) > length else f'{len(data)} of'} {length} requested bytes",
                "servers that support range requests",
                "use another server, or copy the file to this machine",
            )
        if self._current_version() != self._version:
            raise DataError(
                f"{self.path} has changed since it was opened",
                "files that do not change while they are read",
                "restore the file, and resume from the newest checkpoint",
            )
        path = self._path(number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_new(temporary) as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise DataError(
                f"cannot write {path}: {error.strerror}",
                "a folder with free space for the corpus",
                "free space, or set MEGATRON_PATCH_CACHE to another folder",
            ) from error
        return data

    def _range(self, start: int, length: int) -> bytes:
        if self._inner.startswith(("http://", "https://")):
            from fsspec.asyn import sync

            return bytes(sync(self._system.loop, _http_range, self._system, self._inner, start, length))
        return bytes(self._system.cat_file(self._inner, start=start, end=start + length))

    def _from_system(self, call: Callable[[], Any]) -> Any:
        try:
            return _ask(self.path, call)
        except FileNotFoundError as error:
            raise DataError(f"{self.path} does not exist", "the address of a file", "check the address") from error


def remote_exists(address: str) -> bool:
    """Returns whether anything has this address, also a folder.

    Raises:
        DataError: the address is refused, or its server cannot be reached.
    """
    system, inner = _file_system(address)
    try:
        _ask(address, lambda: system.info(inner))
        return True
    except FileNotFoundError:
        return False


def remote_glob(pattern: str) -> list[str]:
    """Returns the addresses of the files that a glob matches, sorted.

    Raises:
        DataError: the address is refused, or its server cannot be reached.
    """
    system, inner = _file_system(pattern)
    try:
        if inner.startswith(("http://", "https://")):
            folder = re.split(r"[*?[]", inner)[0].rpartition("/")[0] + "/"
            # fsspec reads the page as a whole.
            if (_ask(pattern, lambda: system.info(folder)).get("size") or 0) > _MOST_LISTING_BYTES:
                raise DataError(
                    f"{folder} is not a list of files: the server says that it has more than {_MOST_LISTING_BYTES:,} bytes",
                    "the address of a folder, followed by a pattern",
                    "name the files in a list: @FILE",
                )
        return sorted(_ask(pattern, lambda: [str(system.unstrip_protocol(found)) for found in system.glob(inner)]))
    except FileNotFoundError:
        return []


def _cache_folder() -> Path:
    folder = os.environ.get("MEGATRON_PATCH_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "megatron_patch"


def _file_system(address: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the path on it.

    Raises:
        DataError: the address is refused (see `check_address`), or fsspec, or the package that it needs for this kind of address, is not
            installed or cannot be used.
    """
    check_address(address)
    kind = address.partition("://")[0]
    try:
        import fsspec

        system, inner = fsspec.core.url_to_fs(address)
        return system, str(inner)
    except _STOPS:
        raise
    except BaseException as error:
        raise DataError(
            f"{address} cannot be read: {_words(error)}",
            "paths on this machine, or addresses for which fsspec and its package are installed",
            f"{how_to_install('fsspec')} and the package for {kind}:// (s3fs, gcsfs, …), or copy the files to this machine",
        ) from error


def _ask(address: str, call: Callable[[], Any]) -> Any:
    """Returns the result of a call to a remote file system; a call that fails is repeated after a pause, if that may help.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: all attempts failed.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return call()
        except _STOPS:
            raise
        except BaseException as error:  # each file system raises errors of its own, and some libraries in Rust no Exception
            if _is_missing(error):
                raise FileNotFoundError(address) from error
            failure = error
            if isinstance(error, _FINAL) or _status(error) in _FINAL_STATUS:
                break
    raise DataError(
        f"{address} cannot be read: {_words(failure)}",
        "an address that this machine can reach, with credentials if they are required",
        "check the address, the network and the credentials",
    ) from failure


def _status(error: BaseException) -> Any:
    """Returns the HTTP status that an error reports, or None. fsspec's HTTP file system raises FileNotFoundError for any failure."""
    return getattr(error, "status", getattr(error.__cause__, "status", None))


def _is_missing(error: BaseException) -> bool:
    status = _status(error)
    return status in (404, 410) or (isinstance(error, FileNotFoundError) and status is None and error.__cause__ is None)


def _words(error: BaseException) -> str:
    """Returns the kind and the text of an error in one line, of its cause if the error itself only names the address."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:_LONGEST_WORDS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _http_range(system: Any, url: str, start: int, length: int) -> bytes:
    """Returns a range of a file at a web server, and at most one byte more than was asked for.

    fsspec's `cat_file` would read whatever the server sends, which may be the complete file.
    """
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    session = await system.set_session()
    content = bytearray()
    async with session.get(system.encode_url(url), headers=headers, **options) as response:
        response.raise_for_status()
        while len(content) <= length and (piece := await response.content.read(length + 1 - len(content))):
            content += piece
    return bytes(content)
