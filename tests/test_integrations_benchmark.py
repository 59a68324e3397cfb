"""The benchmark of other trainers: its peers compute the same loss, its ratios are per round, and it runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("transformers")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("integrations")


def test_the_published_formulas_give_the_loss_of_ours(benchmark):
    """On the patches that both score: the published code has no label for the last one."""
    model, k = benchmark.make_model(benchmark.TINY), 4
    rows = torch.randint(64, (2, 16 * k))
    published = benchmark.published_loss(model, k)(input_ids=rows, labels=rows)["loss"]
    patches = rows.unflatten(1, (-1, k))
    ours = benchmark.loss_function(model, benchmark.OURS, k)
    found = ours(input_ids=patches[:, :-1], labels=patches[:, 1:])
    assert found.item() == pytest.approx(published.item(), rel=1e-6)


def test_ratios_are_taken_round_by_round(benchmark):
    def results(*seconds):
        return [{"seconds": one, "megabytes": 1.0} for one in seconds]

    measured = {("x", benchmark.WITHOUT, 1): results(1.0, 3.0, 2.0), ("x", benchmark.OURS, 4): results(2.0, 6.0, 1.0)}
    without, ours = benchmark.rows_of(measured, benchmark.TINY)
    assert without["ratio"] == 1.0 and ours["ratio"] == 2.0
    assert ours["tokens_per_cpu_second"] == 2 * 16 * 4 / 2.0


def test_a_peer_is_measured_in_a_process_of_its_own(benchmark):
    found = benchmark.in_child("plain loop", benchmark.OURS, 4, tiny=True)
    assert found["steps"] == benchmark.TINY.steps and found["seconds"] > 0 and found["megabytes"] > 0


@pytest.mark.slow
def test_all_peers_are_measured(tmp_path):
    command = [sys.executable, "benchmarks/integrations.py", "--tiny", "--rounds", "1"]
    environment = {"PYTHONPATH": str(ROOT), "RESULTS": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("integrations-cpu-*.json")
    assert len(json.loads(path.read_text())["results"]) >= 10
