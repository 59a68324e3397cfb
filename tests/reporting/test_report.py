"""The report: its numbers are those of the metrics, losses keep their kinds, and a run in any state can be shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_patch.errors import DataError
from megatron_patch.reporting.history import differing_options, read_history
from megatron_patch.reporting.page import render, write_report
from megatron_patch.training.callbacks.base import EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.events import Events
from megatron_patch.training.callbacks.metrics import Metrics, read_metrics
from tests.reporting.browser import CHROMIUM, MISSING, open_page

ROOT = Path(__file__).parent.parent.parent


def write_run(save, steps=12, seed=0.0, options=None, done=True):
    """Writes the files of a run with half of its steps at K = 4 (400 tokens each) and the rest at K = 1 (100 tokens each)."""
    metrics = Metrics(save / "metrics.jsonl")
    half = steps // 2
    metrics.on_start(RunStart(0, steps, half * 500, ((half * 400, "token"),), 0, "cpu", 2, str(save), 1e6, 0.4))
    for step in range(1, steps + 1):
        patches = step <= half
        stage, index, k = ("patch", 0, 4) if patches else ("token", 1, 1)
        tokens = 400 * min(step, half) + 100 * max(0, step - half)
        loss = 8.123456789 - step * 0.31 + seed
        if step == half + 1:
            metrics.on_switch(SwitchRecord(half, tokens - 100, "patch", "token", 4, 1))
        metrics.on_step(
            StepRecord(
                step,
                stage,
                index,
                k,
                tokens,
                step * 100.0,
                step * 100 / tokens,
                loss,
                1e-3 / step,
                0.7,
                1e3,
                250.0,
                0.1,
                None,
                1.5,
                0.01,
                0.1,
            )
        )
        if step % 3 == 0:
            metrics.on_evaluation(
                EvaluationRecord(step, stage, index, k, tokens, step * 100.0, "valid", 9 - step * 0.3, loss - 0.01, 100, 0.5)
            )
        if step in (half, steps):
            metrics.on_save(SaveRecord(step, str(save / f"step-{step:08d}"), 0.5, 2**20, 0.1))
    if done:
        metrics.on_end(RunEnd("done", steps, half * 500, 3.0))
    metrics.close()
    if options is not None:
        folder = save / f"step-{half:08d}"
        folder.mkdir()
        plan = {"stages": [{"blend": [["data/web", 3.0], ["data/code", 1.0]]}, {"blend": None}]}
        state = {"config": {"options": options, "origins": dict.fromkeys(options, "flag")}, "plan": plan}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return save


class Page(HTMLParser):
    """Collects the embedded data of a page, and everything that it would fetch or run in addition to its script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self._data, self._inside = [], [], "", False
        self.feed(text)
        self.data = json.loads(self._data)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.fetched += [values[name] for name in ("src", "href") if name in values]
        self._inside = values.get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self._data += data


def test_the_page_contains_the_numbers_of_the_metrics(tmp_path):
    save = write_run(tmp_path / "run", options={"lr": 1e-3, "data_path": ["0.75", "data/web", "0.25", "data/code"]})
    write_report([save], tmp_path / "r.html")
    (run,) = Page((tmp_path / "r.html").read_text()).data["runs"]
    records = list(read_metrics(save / "metrics.jsonl"))
    for kind, columns in (("step", run["steps"]), ("evaluation", run["evaluations"])):
        mine = [record for record in records if record["type"] == kind]
        for name, values in columns.items():
            if name != "seconds":
                assert values == [record[name] for record in mine], name
    assert run["evaluations"]["token_loss"] != run["evaluations"]["patch_loss"]
    assert [(stage["name"], stage["patch_size"], stage["tokens"]) for stage in run["stages"]] == [("patch", 4, 0), ("token", 1, 2400)]
    assert [(save["step"], save["tokens"]) for save in run["checkpoints"]] == [(6, 2400), (12, 3000)]
    assert run["blend"] == [["web", 0.75], ["code", 0.25]] and run["stages"][0]["blend"] == [["web", 0.75], ["code", 0.25]]
    assert run["state"] == "done" and run["notes"] == []


def test_the_page_fetches_nothing_and_markup_in_titles_is_text(tmp_path):
    evil = '</script><img src=x onerror="alert(1)"> & <b>'
    save = write_run(tmp_path / "run", options={"wandb_project": evil})
    text = render([read_history(save, evil)], evil)
    page = Page(text)
    assert page.fetched == [] and "img" not in page.tags and page.tags.count("script") == 2
    assert page.data["runs"][0]["label"] == evil and page.data["options"] == [["wandb_project", [evil]]]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)|innerHTML", text)


def test_an_incomplete_line_and_missing_files_lose_only_their_content(tmp_path):
    save = write_run(tmp_path / "run", done=False)
    with (save / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "step": 13, "lo')
    history = read_history(save)
    assert history.steps["step"] == list(range(1, 13)) and history.state == "unfinished"
    assert history.notes == ["skipped 1 incomplete line of metrics.jsonl", "the configuration is unknown: no checkpoint could be read"]
    assert history.events == [] and history.options == {}
    with pytest.raises(DataError, match="does not exist\n.*Allowed.*\n.*What to do"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"type": "start", "step": 0}\n')
    with pytest.raises(DataError, match="contains no steps"):
        read_history(tmp_path)


def test_losses_that_are_not_numbers_are_gaps(tmp_path):
    save = write_run(tmp_path / "run", seed=float("nan"))
    page = Page(render([read_history(save)], "t"))
    assert set(page.data["runs"][0]["steps"]["loss"]) == {None}


def test_pauses_before_restarts_are_not_training_time(tmp_path):
    save = write_run(tmp_path / "run", done=False)
    records = list(read_metrics(save / "metrics.jsonl"))
    first = records[:8]
    lines = [{**record, "time": 1000.0 + index} for index, record in enumerate(first)]
    lines.append({**records[0], "time": 9000.0})
    lines += [{**record, "time": 9000.0 + index} for index, record in enumerate(records[8:], 1)]
    (save / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(save)
    behind = max(index for index, record in enumerate(records[8:], 1) if record["type"] == "step")
    assert history.steps["seconds"][-1] == 7.0 + behind
    assert len(history.starts) == 2 and history.starts[1]["seconds_so_far"] == 7.0


def test_events_are_located_by_step_and_not_listed_twice(tmp_path):
    save = write_run(tmp_path / "run")
    lines = [
        {"type": "start", "time": 1.0, "step": 0},
        {"type": "loss-spike", "time": 2.0, "step": 5, "message": "loss 9.1 at step 5"},
        {"type": "straggler", "time": 3.0, "step": 7, "rank": 3, "behind": 1.5},
        {"type": "end", "time": 4.0, "step": 12, "reason": "done"},
    ]
    (save / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    first, second = read_history(save).events
    assert (first["name"], first["text"], first["tokens"]) == ("loss-spike", "loss 9.1 at step 5", 2000)
    assert (second["text"], second["tokens"]) == ("rank 3, behind 1.5", 2500)


def test_events_of_the_program_are_listed(tmp_path):
    save = write_run(tmp_path / "run")
    events = Events(save / "events.jsonl")
    events.on_start(RunStart(0, 12, 3000, ((2400, "token"),), 0, "cpu", 2, str(save), 1e6, 0.4))
    events.on_event(Event("rewind", 7, "back to step 6, 1 step left out", {"to_step": 6}))
    events.on_end(RunEnd("SIGTERM", 9, 2700, 3.0, 75))
    told = [(event["name"], event["text"], event["tokens"]) for event in read_history(save).events]
    assert told == [("rewind", "back to step 6, 1 step left out", 2500), ("end", "SIGTERM", 2700)]


def test_records_without_the_fields_of_a_step_are_ignored(tmp_path):
    save = write_run(tmp_path / "run")
    with (save / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "step": 13}\n{"type": "save"}\n{"type": 5}\n')
    assert read_history(save).steps["step"][-1] == 12


def test_long_runs_are_thinned_but_keep_the_edges_of_stages(tmp_path):
    history = read_history(write_run(tmp_path / "run", steps=100), most_points=10)
    assert history.thinned == 10 and len(history.steps["step"]) <= 14
    assert {1, 50, 51, 100} <= set(history.steps["step"]) and len(history.evaluations["step"]) == 33


def test_only_options_that_differ_are_listed(tmp_path):
    base = {"lr": 1e-3, "seed": 1, "save": "a", "patch_size": 4}
    runs = [
        read_history(write_run(tmp_path / name, options=options))
        for name, options in (("a", base), ("b", {**base, "save": "b", "patch_size": 1}), ("c", None))
    ]
    assert differing_options(runs) == [("patch_size", [4, 1, None])]
    assert [name for name, _ in differing_options(runs[:1])] == ["lr", "seed", "patch_size"]


def test_the_tool_writes_a_file_and_reports_what_it_cannot_read(tmp_path):
    save = write_run(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "tools/report.py", str(save), "--output", str(tmp_path / "r.html"), "--title", "A <run>"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "no checkpoint could be read" in done.stdout and "1 run)" in done.stdout
    assert "<title>A &lt;run&gt;</title>" in (tmp_path / "r.html").read_text()
    failed = subprocess.run([*words, "--labels", "a", "b"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 3 and "2 labels for 1 run" in failed.stderr and "What to do" in failed.stderr


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_draws_every_chart(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0.0), ("b", 0.2))]
    write_report(runs, tmp_path / "r.html")
    dom = open_page(tmp_path / "r.html", tmp_path / "profile")
    assert dom.count('<svg role="img"') == 9 and "created 20" in dom
    assert dom.count('class="curve') >= 2 * 8 and dom.count('class="ring"') == 2 and "NaN" not in dom.split('<script id="data"')[0]
