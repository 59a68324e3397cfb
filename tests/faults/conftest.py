"""Fixtures of this folder: a corpus, an undisturbed run, a library that makes disks fail, and a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import Run, command, make_corpus, train
from tests.faults.preload import build

PLAN = command(
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 3000 --lr 3e-3 --save-interval 2",
    "--keep-last 0 --zero-stage 1",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of about 20,000 tokens."""
    return make_corpus(Path(tmp_path_factory.mktemp("corpus")) / "walks")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Run:
    """A run of PLAN on two ranks without faults."""
    return train(tmp_path_factory.mktemp("undisturbed") / "run", 2, PLAN, "--data-path", corpus)


@pytest.fixture(scope="session")
def bad_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of preload.c, compiled."""
    library = build("preload", Path(tmp_path_factory.mktemp("preload")))
    if library is None:
        pytest.skip("needs a C compiler")
    return library


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
