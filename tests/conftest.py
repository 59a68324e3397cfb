"""What all tests share: one thread a process, deterministic hypothesis, nothing fetched, nothing written into the repository's root."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parent.parent / "build" / "hypothesis"))

import pytest
from hypothesis import HealthCheck, settings

from tests import skips

# The same examples in every run: a failure is repeated by running the test again, here as in CI.
settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=50, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


SEVERAL_PROCESSES = {
    "trained on several ranks": ("tests/distributed/", "tests/engine/", "tests/oracle/"),
    "failures and clusters": ("tests/faults/", "tests/slurm/", "tests/test_docs_run.py", "tests/test_installed.py"),
}
"""Tests that keep several cores busy, or wait for other processes: they come last, in two groups of which each runs one after another."""


def group_of(nodeid: str) -> str | None:
    """Returns the group of `SEVERAL_PROCESSES` to which a test belongs; None for all other tests."""
    return next((name for name, starts in SEVERAL_PROCESSES.items() if nodeid.startswith(starts)), None)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the report of skipped tests."""
    config.pluginmanager.register(skips, "skips")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: a worker takes a whole file, and at the end a whole group of those that are several processes."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid) or nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several processes come last; GPU tests are skipped where there is none; the server that ranks are forked from is started
    before any other use of it."""
    import torch

    items.sort(key=lambda item: group_of(item.nodeid) or "")

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if ranks := sys.modules.get("tests.distributed.ranks"):
        ranks.start_server()
