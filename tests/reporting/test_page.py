"""The page holds what the runs' files hold, needs nothing from elsewhere, and survives what kills leave behind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from megatron_patch.errors import DataError
from megatron_patch.reporting import read
from megatron_patch.reporting.page import write_report
from megatron_patch.reporting.read import EVALUATION_COLUMNS, STEP_COLUMNS, read_run
from megatron_patch.training.callbacks.base import EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.events import Events
from megatron_patch.training.callbacks.metrics import Metrics, read_metrics

START = RunStart(0, 20, 3200, ((1600, "token"),), 0, "cpu", 2, None, 1e6, 0.5)
STEP = StepRecord(1, "patch", 0, 4, 100, 25.0, 0.25, 5.5, 1e-3, 0.9, 1000.0, 250.0, 0.1, None, 1.5, 0.01, 0.1)
EVALUATION = EvaluationRecord(1, "patch", 0, 4, 100, 25.0, "valid", 6.5, 5.25, 1000, 2.0)


def make_run(folder, steps=20, lr=1e-3, torn=False):
    """A run of two stages, through the listeners that write real ones."""
    listeners = [Metrics(folder / "metrics.jsonl"), Events(folder / "events.jsonl")]
    for one in listeners:
        one.on_start(START)
        for step in range(1, steps + 1):
            stage = ("patch", 0, 4) if step <= 10 else ("token", 1, 1)
            place = dict(
                zip(("stage", "stage_index", "patch_size"), stage, strict=True), step=step, tokens=160 * step, cost_tokens=40.0 * step
            )
            one.on_step(replace(STEP, **place, loss=6.0 - 0.1 * step, lr=lr))
            if step % 5 == 0:
                one.on_evaluation(replace(EVALUATION, **place, token_loss=6.5 - 0.1 * step))
            if step == 10:
                one.on_save(SaveRecord(10, str(folder / "step-10"), 1.0, 2**20))
                one.on_switch(SwitchRecord(10, 1600, "patch", "token", 4, 1))
        one.on_event(Event("skip", 7, "</script><b>a sick step", {}))
        one.on_end(RunEnd("done", steps, 160 * steps, 1.0))
        one.close()
    if torn:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('[1]\n{"type": "step", "step": 21, "lo')
    (folder / "step-10").mkdir()
    options = {"lr": lr, "patch_size": 4, "data_path": ["3", "a/web", "1", "a/code"]}
    (folder / "step-10" / "trainer_state.json").write_text(json.dumps({"config": {"options": options, "origins": {}}}))
    return folder


class Page(HTMLParser):
    """The tags of a page, and the text of its data element."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._inside, self._open = [], "", False, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._inside = False

    def handle_data(self, text):
        self.data += text if self._inside else ""


def page(tmp_path, *runs, **options):
    write_report(runs, tmp_path / "report.html", **options)
    text = (tmp_path / "report.html").read_text()
    return Page(text), text


def test_the_page_holds_what_the_files_hold(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=2e-3)]
    found, _ = page(tmp_path, *runs, names=["A", "B"])
    data = json.loads(found.data)
    assert [run["name"] for run in data["runs"]] == ["A", "B"] and not found._open
    for folder, run in zip(runs, data["runs"], strict=True):
        records = list(read_metrics(folder / "metrics.jsonl"))
        for kind, columns, held in (("step", STEP_COLUMNS, run["steps"]), ("evaluation", EVALUATION_COLUMNS, run["evaluations"])):
            rows = [record for record in records if record["type"] == kind]
            for name in columns:
                assert held[name] == [row[name] for row in rows], name
        assert [(stage["name"], stage["patch_size"], stage["tokens"]) for stage in run["stages"]] == [("patch", 4, 0), ("token", 1, 1600)]
        assert [(save["step"], save["tokens"], save["bytes"]) for save in run["saves"]] == [(10, 1600, 2**20)]
        assert run["blend"] == [["a/web", 0.75], ["a/code", 0.25]] and run["state"] == "done" and run["torn"] == 0
        assert [event["type"] for event in run["events"]] == ["start", "skip", "end"]
    assert data["differing"] == [["lr", [1e-3, 2e-3]]]


def test_it_needs_nothing_from_elsewhere(tmp_path):
    found, text = page(tmp_path, make_run(tmp_path / "a"))
    assert not [tag for tag, given in found.tags if tag in ("link", "img", "iframe") or "src" in given or "href" in given]
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "fetch(" not in text and "url(" in text
    assert text.count("</script>") == 2, "no text of a run ends the element that holds it"


def test_torn_lines_are_left_out_and_counted(tmp_path):
    found, _ = page(tmp_path, make_run(tmp_path / "a", torn=True))
    (run,) = json.loads(found.data)["runs"]
    assert run["steps"]["step"] == list(range(1, 21)) and run["torn"] == 2 and run["state"] == "done"


def test_losses_that_are_no_numbers_are_null(tmp_path):
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "time": 1, "step": 21, "tokens": 3360, "cost_tokens": 840, "loss": NaN, "stage_index": 1}\n')
    found, _ = page(tmp_path, folder)
    run = json.loads(found.data, parse_constant=pytest.fail)["runs"][0]
    assert run["steps"]["loss"][-1] is None and run["steps"]["lr"][-1] is None


def test_time_at_work_leaves_out_what_lies_between_runs(tmp_path):
    lines = [("start", 0.0), ("step", 10.0), ("step", 20.0), ("start", 5000.0), ("step", 5010.0)]
    rows = [{"type": kind, "time": when, "step": n, "tokens": n, "stage_index": 0} for n, (kind, when) in enumerate(lines)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [hours * 3600 for hours in read_run(tmp_path).steps["hours"]] == pytest.approx([10, 20, 30])


def test_long_runs_are_thinned_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LONGEST", 5)
    assert read_run(make_run(tmp_path / "a")).steps["step"] == [1, 6, 11, 15, 20]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"type": "start"}\n')
    with pytest.raises(DataError, match="holds no steps"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(DataError, match="2 names for 1 runs"):
        write_report([make_run(tmp_path / "a")], tmp_path / "r.html", ["x", "y"])
