"""What all tests share: one thread a process, deterministic hypothesis, nothing fetched, nothing written into the repository's root."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parent.parent / "build" / "hypothesis"))

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run: a failure is repeated by running the test again, here as in CI.
settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=50, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


SEVERAL_PROCESSES = ("tests/distributed/", "tests/engine/", "tests/faults/", "tests/slurm/", "tests/test_docs_run.py")
"""Tests that keep all cores busy themselves: they come last, one after another."""


# First, as pytest-xdist reads the groups in its own.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files go to workers as a whole, those of several processes after all others; GPU tests are skipped where there is none; the server
    that ranks are forked from is started before any other use of it."""
    import torch

    for item in items:
        path = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("several processes" if path.startswith(SEVERAL_PROCESSES) else path))
    items.sort(key=lambda item: item.nodeid.startswith(SEVERAL_PROCESSES))

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if ranks := sys.modules.get("tests.distributed.ranks"):
        ranks.start_server()
