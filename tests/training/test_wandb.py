"""Weights & Biases, with its own library: a run and its resumption, without a login, a network or an answer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks.charts import Charts, named_values
from megatron_patch.training.callbacks.wandb import WeightsAndBiases
from tests.training.records import END, EVALUATION, START, STEP
from tests.training.wandb_server import WandbServer

KEY = "7f3a9c5511d2" + "0" * 28


@pytest.fixture
def log_a_run(tmp_path, monkeypatch, capsys):
    """Logs one start of a run to wandb; returns what was printed."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    def log(patience=20.0):
        board = Charts(WeightsAndBiases("project", "name", tmp_path / "run", {"lr": 1.0}, patience), tmp_path / "run" / "metrics.jsonl")
        board.on_start(START)
        board.on_step(STEP)
        board.on_evaluation(EVALUATION)
        board.on_end(END)
        board.close()
        wandb.teardown()  # ends its process, which has read the environment and writes the files
        return capsys.readouterr().err

    wandb.teardown()
    return log


def offline_files(folder):
    """The files of the run that `wandb sync` uploads."""
    run_id = (folder / "run" / "wandb_run_id").read_text().strip()
    return sorted((folder / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))


VALUES = [{"tokens": 100, **named_values(STEP)}, {"tokens": 100, **named_values(EVALUATION)}]


@pytest.mark.parametrize("login", ["offline", "missing"])
def test_weights_and_biases_gets_the_records_over_tokens_in_one_run(log_a_run, tmp_path, monkeypatch, login):
    """Without a login training continues, and the folder is printed."""
    if login == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    printed = log_a_run() + log_a_run()
    files = offline_files(tmp_path)
    assert len(files) == 2, "a resumed run is the same one"
    for path in files:
        records = list(logged_records(path))
        (run,) = (record.run for record in records if record.run.run_id)
        assert (run.project, run.display_name) == ("project", "name")
        assert {item.key: item.value_json for item in run.config.update}["lr"] == "1.0"
        history = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.history.item
        ]
        values = [{name: value for name, value in line.items() if not name.startswith("_")} for line in history]
        assert values == VALUES
        assert {record.metric.step_metric for record in records} - {""} == {"tokens"}
    folders = {str(path.parent) for path in files}
    assert set(re.findall("wandb sync (.*)", printed)) == (folders if login == "missing" else set())


@contextlib.contextmanager
def silent_server(listening):
    """A port of this machine that accepts and never answers, or refuses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen(50)
        yield server.getsockname()[1]


@pytest.mark.parametrize("network", ["refused", "no answer"])
def test_without_a_network_the_run_is_logged_to_a_folder_and_continues_online_later(log_a_run, tmp_path, monkeypatch, network):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with silent_server(listening=network == "no answer") as port:
        monkeypatch.setenv("WANDB_BASE_URL", url := f"http://127.0.0.1:{port}")
        printed = log_a_run(patience=0.2)
    (file,) = offline_files(tmp_path)
    reason = f"there is no connection to {url}" if network == "refused" else f"{url} does not answer within 0.2 s"
    assert printed.splitlines() == [
        f"Weights & Biases cannot be used: {reason}; training continues, and the run is logged to a folder, "
        f"which this uploads: wandb sync {file.parent}"
    ]
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert log_a_run() == ""
    assert server.run_ids() == {(tmp_path / "run" / "wandb_run_id").read_text().strip()} and server.history() == VALUES


def test_a_start_that_wandb_cannot_finish_is_logged_to_a_folder(log_a_run, tmp_path, monkeypatch):
    """The server refuses the key: until its process ends, wandb holds the id of the run "in use"."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        server.status = 403
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        (line,) = log_a_run(patience=1.0).splitlines()
    (file,) = offline_files(tmp_path)
    assert line.startswith("Weights & Biases cannot be used: ") and line.endswith(f"wandb sync {file.parent}") and KEY not in line


def test_a_server_that_goes_away_does_not_delay_the_end(log_a_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server = WandbServer()
    create_files = "createRunFiles"
    answer = server.RequestHandlerClass._data

    def leave(self, query, variables):
        if create_files in query:
            server.shutdown()
            server.server_close()
        return answer(self, query, variables)

    monkeypatch.setattr(server.RequestHandlerClass, "_data", leave)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    printed = log_a_run(patience=2.0)
    assert re.fullmatch(
        r"Weights & Biases may lack the last values: the server did not take them within 2 s; wandb sync \S+/run/wandb/run-\S+ uploads them; "
        r"\S+/run/metrics.jsonl has all values\n",
        printed,
    )


def test_a_missing_wandb_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"megatron_patch\[wandb\]"):
        WeightsAndBiases("project", None, None, {})


def logged_records(path):
    """What W&B would upload: a log of protobuf records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, payload = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record
