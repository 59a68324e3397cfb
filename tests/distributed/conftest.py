"""A corpus and the runs of one process that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.matrix import References
from tests.distributed.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of about 20,000 tokens."""
    return make_corpus(Path(tmp_path_factory.mktemp("corpus")) / "walks")


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> References:
    """The runs of one process that layouts are compared with, each trained when it is first used."""
    return References(tmp_path_factory.mktemp("single"), corpus)
