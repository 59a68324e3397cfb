"""MLflow, with its own library: a run and its resumption, in its file store; and servers that do not answer."""

from __future__ import annotations

import math
import socket
import sys
from dataclasses import replace

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks import mlflow as module
from megatron_patch.training.callbacks.base import CorpusLoss, RunEnd
from megatron_patch.training.callbacks.charts import Charts, named_values
from megatron_patch.training.callbacks.delivery import Delivery
from megatron_patch.training.callbacks.mlflow import MLflow
from tests.training.records import END, EVALUATION, START, STEP

OPTIONS = {"lr": 1.0, "data_path": ["1", "x"], "long": "x" * 7000} | {f"option_{number}": number for number in range(150)}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    pytest.importorskip("mlflow")
    for name in ("TRACKING_URI", "HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "DISABLE_TELEMETRY"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")  # so that what the program sets is undone
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def log(uri, save, records, end=END, options=OPTIONS, tokens=0):
    board = Charts(MLflow("an experiment", uri, "name", save, options), save / "metrics.jsonl")
    board.on_start(replace(START, tokens=tokens))
    for record in records:
        (board.on_evaluation if record.step == 0 else board.on_step)(record)
    if end is not None:
        board.on_end(end)
    board.close()


def test_a_run_and_its_resumption_are_one_run_over_tokens(tmp_path, capsys):
    import mlflow

    uri, save, evaluation = (tmp_path / "store").as_uri(), tmp_path / "run", replace(EVALUATION, step=0)
    client = mlflow.MlflowClient(tracking_uri=uri)

    def runs():
        return client.search_runs([client.get_experiment_by_name("an experiment").experiment_id])

    log(uri, save, [STEP, evaluation], RunEnd("SIGTERM", 1, 100, 1.0, 75))
    (run,) = runs()
    assert (run.info.run_name, run.info.status, run.info.run_id) == ("name", "KILLED", (save / "mlflow_run_id").read_text().strip())
    assert run.data.params == {name: str(value)[:6000] for name, value in OPTIONS.items()}
    log(uri, save, [replace(STEP, tokens=200, loss=math.nan)], options={**OPTIONS, "lr": 2.0}, tokens=100)
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "1.0" and run.data.tags["changed.lr"] == "2.0"
    assert {*run.data.metrics} == {*named_values(STEP), *named_values(EVALUATION)}
    history = client.get_metric_history(run.info.run_id, "train/patch_loss")
    assert [metric.step for metric in history] == [100, 200] and history[0].value == 5.5 and math.isnan(history[1].value)
    log(uri, save, [STEP], end=None)
    assert runs()[0].info.status == "FAILED"
    client.delete_run(run.info.run_id)
    log(uri, save, [STEP])
    assert [other.info.run_id for other in runs()] == [(save / "mlflow_run_id").read_text().strip()] != [run.info.run_id]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("network", ["refused", "no answer"])
def test_a_server_that_does_not_answer_is_one_line(tmp_path, capsys, network):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "no answer":
            server.listen(50)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        board = Delivery(MLflow("an experiment", uri, None, tmp_path, OPTIONS, patience=1.0), None)
        board.begin(START)
        board.put(STEP)
        board.attempt()
    reason = f"there is no connection to {uri}" if network == "refused" else f"{uri} does not answer within 1 s"
    assert capsys.readouterr().err == f"MLflow fails: {reason}; training continues, its values wait in memory, and a retry follows\n"


def test_names_of_corpora_are_made_acceptable():
    pytest.importorskip("mlflow")
    from mlflow.utils.validation import _validate_metric_name

    for corpus in ("web", "../a/./b//c/", "data*?%\u2028\nx", "ü", "x" * 300):
        (*_, name) = named_values(replace(EVALUATION, corpora={"a": CorpusLoss(1, 1, 1, 1), corpus: CorpusLoss(1, 1, 1, 1)}))
        _validate_metric_name(module._name(name))
        assert len(module._name(name)) <= 250
    assert [module._name(name) for name in named_values(STEP)] == [*named_values(STEP)]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="--mlflow-tracking-uri, or MLFLOW_TRACKING_URI"):
        MLflow("an experiment", None, None, None, {})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install .*'megatron_patch\[mlflow\]'"):
        MLflow("an experiment", "http://host", None, None, {})
