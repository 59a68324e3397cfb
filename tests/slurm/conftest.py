"""One Slurm cluster and one corpus for all tests of this folder; tests are skipped if Slurm cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import make_corpus
from tests.slurm.cluster import NODES, Cluster, missing, wait_until


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with both nodes idle; jobs that the test leaves running are canceled."""
    cluster = running_cluster
    wait_until(lambda: cluster.idle_nodes() == list(NODES), "idle nodes", explain=cluster.logs)
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of about 20,000 tokens."""
    return make_corpus(Path(tmp_path_factory.mktemp("corpus")) / "walks")
