"""The corpus that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of about 20,000 tokens."""
    return make_corpus(Path(tmp_path_factory.mktemp("corpus")) / "walks")
