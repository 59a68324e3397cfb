"""Files that are read as a whole have a size that fits into memory, whatever was put in their place."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_patch.utils.files import read_json, read_small


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_file_up_to_the_limit_is_read_as_a_whole(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(range(size)))
    assert read_small(tmp_path / "x", 10) == bytes(range(size))


def test_a_longer_file_is_refused_with_its_size_and_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"12345678901")
    with pytest.raises(OSError, match="it has 11 bytes, and such a file may have up to 10") as caught:
        read_small(tmp_path / "x", 10)
    assert caught.value.errno == errno.EFBIG


def test_files_of_the_kernel_that_report_no_size_are_read_and_bounded(tmp_path):
    assert read_small("/proc/self/comm", 1000) == Path("/proc/self/comm").read_bytes()
    with pytest.raises(OSError, match="it has more than 10 bytes"):
        read_small("/proc/self/status", 10)


def test_what_is_no_file_is_refused_unless_it_may_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="it is not a file"):
            read_small(path, 10)
    assert read_small("/dev/null", 10, wait=True) == b""
    with pytest.raises(OSError, match="it has more than 10 bytes"):
        read_small("/dev/zero", 10, wait=True)
    with pytest.raises(OSError, match="nothing came out of it"):
        read_small(tmp_path / "pipe", 10, wait=True)
    with pytest.raises(IsADirectoryError):
        read_small(tmp_path, 10, wait=True)


def test_a_pipe_is_read_until_its_writer_closes_it():
    source, target = os.pipe()

    def write():
        for _ in range(100):
            os.write(target, b"x" * 5000)
        os.close(target)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_small(f"/dev/fd/{source}", 1 << 20, wait=True) == b"x" * 500_000
    writer.join()
    os.close(source)


def test_nothing_is_allocated_for_a_file_that_is_too_long(tmp_path):
    """In a process that may use only a little more memory than it does."""
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(200 << 30)
    code = (
        "import resource, sys\nfrom megatron_patch.utils.files import read_json\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try:\n    read_json(sys.argv[1])\nexcept OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.json")], capture_output=True, text=True)
    assert done.stdout == "it has 214,748,364,800 bytes, and such a file may have up to 67,108,864\n", done.stderr


def test_json_is_read_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_bytes('\ufeff{"a": 1}'.encode())
    assert read_json(tmp_path / "x.json") == {"a": 1}
