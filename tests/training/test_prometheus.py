"""Prometheus: the file for node_exporter and the port, read by the parser of its own client."""

from __future__ import annotations

import math
import socket
import sys
import urllib.request
from dataclasses import replace

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks.base import CorpusLoss, Event, RunEnd, SaveRecord
from megatron_patch.training.callbacks.charts import Charts, named_values
from megatron_patch.training.callbacks.delivery import Delivery, Timed
from megatron_patch.training.callbacks.prometheus import PrometheusFile, PrometheusPort
from tests.training.records import END, EVALUATION, EXPERTS, START, STEP

NAME = 'a "run"\\ of\nmine'
BLEND = replace(EVALUATION, corpora={"web": CorpusLoss(0.5, 6.25, 5.0, 500), 'x/"y"': CorpusLoss(0.5, math.nan, 5.0, 500)})


@pytest.fixture(autouse=True)
def package():
    pytest.importorskip("prometheus_client")


def parsed(text):
    """(type and help of each family, value of each sample by its name and labels)."""
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, *sorted(item for item in sample.labels.items() if item != ("run", NAME))): sample.value
        for family in families
        for sample in family.samples
    }
    assert all(sample.labels["run"] == NAME for family in families for sample in family.samples)
    return {family.name: (family.type, family.documentation) for family in families}, samples


def test_the_file_has_the_newest_numbers(tmp_path):
    path = tmp_path / "node" / "run.prom"
    board = Charts(PrometheusFile(path, NAME), None)
    board.on_start(replace(START, tokens=50))
    board.on_step(STEP)
    board.on_event(Event("skip", 2, "rejected", {}))
    board.on_step(replace(STEP, step=2, tokens=150, loss=math.nan, grad_norm=math.inf, skipped=True))
    board.on_evaluation(BLEND)
    board.on_save(SaveRecord(2, "x", 1.0, 1, 1.0))
    board.on_step(replace(STEP, step=3, stage="token", stage_index=1, patch_size=1, tokens=200, loss=4.5))
    board.on_end(END)
    board.close()
    kinds, samples = parsed(path.read_text())
    assert [entry.name for entry in path.parent.iterdir()] == ["run.prom"]
    token, patch = ("stage", "token"), ("stage", "patch")
    for name, value in named_values(replace(STEP, patch_size=1, loss=4.5)).items():
        assert samples["megatron_patch_" + name.replace("/", "_"), token] == value
    assert ("megatron_patch_train_patch_loss", patch) not in samples, "only the newest step is shown"
    assert samples["megatron_patch_eval_token_loss", patch] == 6.5
    assert samples["megatron_patch_eval_token_loss", ("corpus", "web"), patch] == 6.25
    assert math.isnan(samples["megatron_patch_eval_token_loss", ("corpus", 'x/"y"'), patch])
    assert samples["megatron_patch_steps_total", patch] == 2 and samples["megatron_patch_steps_total", token] == 1
    assert samples["megatron_patch_skipped_steps_total", patch] == 1 and samples["megatron_patch_events_total", ("kind", "skip")] == 1
    assert samples["megatron_patch_read_tokens_total", patch] == 100 and samples["megatron_patch_tokens", token] == 200
    assert samples["megatron_patch_saves_total",] == samples["megatron_patch_evaluations_total",] == 1
    assert samples["megatron_patch_running",] == 0 and samples["megatron_patch_last_save_timestamp_seconds",] > 1.7e9
    assert kinds["megatron_patch_train_lr"] == ("gauge", "learning rate") and kinds["megatron_patch_steps"][0] == "counter"
    assert kinds["megatron_patch_train_token_loss"][1] == "mean loss in nats per label, at the stage's K"
    assert all(kind in ("gauge", "counter") and meaning for kind, meaning in kinds.values())


def test_the_load_of_experts_has_the_label_of_its_block(tmp_path):
    board = Charts(PrometheusFile(tmp_path / "run.prom", NAME), None)
    board.on_start(START)
    board.on_step(replace(STEP, **EXPERTS))
    board.on_event(Event("collapse", 2, "of block 12", {}))
    board.close()
    kinds, samples = parsed((tmp_path / "run.prom").read_text())
    load, stage = "megatron_patch_train_expert_load", ("stage", "patch")
    assert [samples[load, stage], samples[load, ("block", "1"), stage], samples[load, ("block", "12"), stage]] == [3.8, 1.25, 3.8]
    assert samples["megatron_patch_train_dead_experts", stage] == 5 and samples["megatron_patch_train_router_entropy", stage] == 0.5
    assert samples["megatron_patch_events_total", ("kind", "collapse")] == 1
    assert "worst block" in kinds[load][1] and kinds[load][0] == "gauge"


def test_numbers_that_are_not_finite_are_numbers(tmp_path):
    board = Charts(PrometheusFile(tmp_path / "run.prom", NAME), None)
    board.on_start(START)
    board.on_step(replace(STEP, loss=math.nan, grad_norm=math.inf))
    board.close()
    _, samples = parsed((tmp_path / "run.prom").read_text())
    assert math.isnan(samples["megatron_patch_train_patch_loss", ("stage", "patch")])
    assert samples["megatron_patch_train_grad_norm", ("stage", "patch")] == math.inf and samples["megatron_patch_running",] == 0


def test_records_that_a_full_disk_refused_are_counted_once(tmp_path, capsys):
    service = PrometheusFile(tmp_path / "run.prom", NAME)
    board = Delivery(service, None, clock=lambda: 0.0)
    board.begin(START)
    (tmp_path / "run.prom").mkdir()
    for step in range(1, 4):
        board.put(replace(STEP, step=step))
        board.attempt()
    assert "run.prom fails: " in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.prom"], "no temporary file stays"
    (tmp_path / "run.prom").rmdir()
    board.attempt()
    _, samples = parsed((tmp_path / "run.prom").read_text())
    assert samples["megatron_patch_steps_total", ("stage", "patch")] == 3 and samples["megatron_patch_running",] == 1


def test_the_port_answers_and_one_in_use_is_a_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        busy = Delivery(PrometheusPort(port, "127.0.0.1", NAME), None)
        busy.begin(START)
        busy.attempt()
    assert f"--prometheus-port {port} fails: Address already in use; training continues" in capsys.readouterr().err
    service = PrometheusPort(port, "127.0.0.1", NAME)
    service.open(START)
    service.add([Timed(1.0, START), Timed(2.0, STEP)])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        _, samples = parsed(answer.read().decode())
    service.close(RunEnd("done", 1, 100, 1.0))
    assert samples["megatron_patch_train_lr", ("stage", "patch")] == 1e-3 and samples["megatron_patch_running",] == 1


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install .*'megatron_patch\[prometheus\]'"):
        PrometheusFile(tmp_path / "run.prom", NAME)
