"""The report: its numbers are those of the metrics, losses keep their kinds, and a run in any state can be shown."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import DataError
from megatron_patch.reporting.history import differing_options, read_history
from megatron_patch.reporting.page import render, write_report
from megatron_patch.reporting.plotting import plot_runs, read_curve
from megatron_patch.reporting.thinning import Thinning
from megatron_patch.training.callbacks.base import (
    CorpusLoss,
    EvaluationRecord,
    Event,
    RunEnd,
    RunStart,
    SaveRecord,
    StepRecord,
    SwitchRecord,
)
from megatron_patch.training.callbacks.events import Events
from megatron_patch.training.callbacks.metrics import Metrics, read_metrics
from tests.reporting.browser import CHROMIUM, MISSING, open_page

ROOT = Path(__file__).parent.parent.parent


def write_run(save, steps=12, seed=0.0, options=None, done=True, corpora=(), experts=lambda step: {}):
    """Writes the files of a run with half of its steps at K = 4 (400 tokens each) and the rest at K = 1 (100 tokens each).

    `experts` returns a step's fields of experts. Of several corpora, the first has the loss of the step, and each other one half a nat more than the one before it.
    """
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
                **experts(step),
            )
        )
        if step % 3 == 0:
            parts = {name: CorpusLoss(1 / len(corpora), loss + 0.5 * n, loss, 50) for n, name in enumerate(corpora)}
            metrics.on_evaluation(
                EvaluationRecord(step, stage, index, k, tokens, step * 100.0, "valid", 9 - step * 0.3, loss - 0.01, 100, 0.5, parts)
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


def of_experts(step):
    """The fields of a step with experts in blocks 1 and 3."""
    return {"expert_blocks": (1, 3), "expert_load": (1.0 + step / 100, 3.5), "dead_experts": (0, step), "router_entropy": (2.0, 1.5)}


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
    assert history.notes == [
        "metrics.jsonl: line 21: it is incomplete; row left out",
        "the configuration is unknown: no checkpoint could be read",
    ]
    assert history.events == [] and history.options == {}
    with pytest.raises(DataError, match="does not exist\n.*Allowed.*\n.*What to do"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"type": "start", "step": 0}\n')
    with pytest.raises(DataError, match="contains no steps"):
        read_history(tmp_path)


def test_the_losses_of_corpora_are_read_by_name_and_may_begin_later(tmp_path):
    """As after a resumption with more held-out corpora, or with a version that records them."""

    def change(records):
        evaluations = [record for record in records.values() if record["type"] == "evaluation"]
        del evaluations[0]["corpora"]
        evaluations[1]["corpora"] = {"web": evaluations[1]["corpora"]["web"] | {"weight": 0.9}}
        evaluations[2]["corpora"] = {"a\x1b\u202eb": {"weight": None, "token_loss": None, "token_loss_text": "nan"}} | evaluations[2][
            "corpora"
        ]

    save = write_run(tmp_path / "run", corpora=("web", "code"))
    history = rewritten(save, change)
    losses = [8.123456789 - step * 0.31 for step in (3, 6, 9, 12)]
    assert [(corpus["name"], corpus["weight"], corpus["token_loss"]) for corpus in history.corpora] == [
        ("web", 0.5, [None, *losses[1:]]),
        ("a\\x1b\\u202eb", None, [None] * 4),
        ("code", 0.5, [None, None, losses[2] + 0.5, losses[3] + 0.5]),
    ]
    assert len(history.notes) == 1 and history.evaluations["step"] == [3, 6, 9, 12]
    curve = read_curve(save, corpus="code")
    assert curve.losses == [losses[2] + 0.5, losses[3] + 0.5]
    assert curve.notes == ["draws no evaluation without code: from step 3 to 6"]
    assert read_curve(save).losses == history.evaluations["token_loss"]
    with pytest.raises(DataError, match="no evaluation of books\n.*one of web, .*code\n.*--corpus"):
        read_curve(save, corpus="books")
    with pytest.raises(DataError, match="a run whose evaluations name their corpora"):
        read_curve(write_run(tmp_path / "old"), corpus="books")
    with pytest.raises(DataError, match="no evaluation of books\n.*one of web\n"):
        read_curve(write_run(tmp_path / "one", corpora=("web",)), corpus="books")


@pytest.mark.parametrize(
    ("corpora", "what"),
    [
        ([1], "corpora is a list"),
        ({"web": 3.5}, "corpora, 'web': it is not an object"),
        ({"web": {"weight": 1.0, "token_loss": "low"}}, "corpora, 'web': token_loss is text"),
        ({"x" * 99: {"weight": 1e300}}, f"corpora, '{'x' * 40}': weight is 1e+300"),
    ],
)
def test_an_evaluation_with_damaged_losses_of_corpora_is_left_out_and_named(tmp_path, corpora, what):
    def change(records):
        (line,) = (line for line, record in records.items() if record["type"] == "evaluation" and record["step"] == 6)
        records[line]["corpora"] = corpora

    history = rewritten(write_run(tmp_path / "run"), change)
    assert history.notes[0].endswith(f": {what}; row left out") and history.evaluations["step"] == [3, 9, 12]


def test_very_many_corpora_do_not_fill_the_memory(tmp_path):
    def change(records):
        for record in records.values():
            if record["type"] == "evaluation":
                record["corpora"] = {f"{record['step']}-{n}" + "x" * 500: {"token_loss": 1.0} for n in range(500)}

    history = rewritten(write_run(tmp_path / "run"), change)
    assert len(history.corpora) == 200 and all(len(corpus["name"]) == 300 for corpus in history.corpora)
    assert "shows the first 200 corpora" in history.notes


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


def test_records_without_the_fields_of_a_step_are_left_out_and_named(tmp_path):
    save = write_run(tmp_path / "run")
    with (save / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "step": 13}\n{"type": "save"}\n{"type": 5}\n[1]\n{"type": "of a later version"}\n')
    history = read_history(save)
    assert history.steps["step"][-1] == 12
    assert history.notes[:4] == [
        f"metrics.jsonl: line {line}: {what}; row left out"
        for line, what in [(22, "stage_index is missing"), (23, "step is missing"), (24, "type is 5"), (25, "it is not a JSON object")]
    ]


def rewritten(save, change):
    """Changes the records of a metrics file; `change` gets them by line, from 1."""
    path = save / "metrics.jsonl"
    records = dict(enumerate(map(json.loads, path.read_text().splitlines()), 1))
    change(records)
    path.write_text("".join(json.dumps(records[line]) + "\n" for line in sorted(records)))
    return read_history(save)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("loss", [1.0], "loss is a list"),
        ("loss", float("inf"), "it is not valid JSON"),
        ("loss", float("nan"), "it is not valid JSON"),
        ("loss", "3.5", "loss is text"),
        ("loss", 1e300, "loss is 1e+300"),
        ("step", [5], "step is a list"),
        ("step", 4.5, "step is 4.5"),
        ("step", True, "step is true or false"),
        ("step", 10**400, "it is not valid JSON"),
        ("step", 10**30, "step is 1e+30"),
        ("step", 10**15, "step 1,000,000,000,000,000 is followed by an earlier place of the run, step 5"),
        ("step", 2, "step 2 comes after step 3"),
        ("tokens", -1, "tokens is -1"),
        ("tokens", {"a": {}}, "tokens is an object"),
        ("tokens", 10**18, "step 4 is followed by an earlier place of the run, step 5"),
        ("stage_index", 7, "step 4 is followed by an earlier place of the run, step 5"),
        ("time", 1e300, "time is 1e+300"),
        ("stage", None, "stage is missing"),
        ("stage", "\ud800", "it is not valid JSON"),
    ],
    ids=str,
)
def test_a_bad_row_is_left_out_with_its_line_and_reason_and_all_others_are_shown(tmp_path, name, value, what):
    def change(records):
        (line,) = (line for line, record in records.items() if record.get("step") == 4 and record["type"] == "step")
        assert line == 6
        records[line][name] = value

    history = rewritten(write_run(tmp_path / "run"), change)
    assert history.notes[0] == f"metrics.jsonl: line 6: {what}; row left out" and len(history.notes) == 2
    assert history.steps["step"] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12] and len(history.stages) == 2


def test_a_repeated_step_is_shown_once(tmp_path):
    history = rewritten(write_run(tmp_path / "run"), lambda records: records.update({6.5: records[6]}))
    assert history.steps["step"] == list(range(1, 13)) and "line 6: step 4 is followed by" in history.notes[0]


def test_many_bad_rows_are_counted(tmp_path):
    save = write_run(tmp_path / "run")
    with (save / "metrics.jsonl").open("a") as file:
        file.write("{\n" * 500 + "x" * 3_000_000 + "\n" + '{"type": "end", "reason": "SIGTERM"}\n')
    history = read_history(save)
    assert history.state == "stopped" and history.notes[10] == "metrics.jsonl: 491 more rows left out"


HOSTILE = [
    *(None, True, [], [1], {}, {"a": {"b": [{}]}}, "", "1", "nan", "</script>", "\x00", "\ud800", "x" * 10_000, "$\\frac{", -1, 0, 1.5),
    *(-0.0, 10**15, 2**62, 2**63, 2**64, 10**30, 10**400, -(10**400), 1e300, -1e300, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
]


def mutated(draw, text):
    """Returns the text of a JSON Lines file with one row damaged."""
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    match draw.randrange(8):
        case 0:
            del lines[number]
        case 1:
            lines.insert(draw.randrange(len(lines) + 1), lines[number])
        case 2:
            lines[number] = lines[number][: draw.randrange(len(lines[number]))]
        case 3:
            lines[number] = json.dumps(draw.choice(HOSTILE))
        case 4:
            at = draw.randrange(len(lines[number]))
            lines[number] = lines[number][:at] + draw.choice('{}[]",:\\0-e9\x00 \n') + lines[number][at + 1 :]
        case _:
            try:
                record = json.loads(lines[number])
                names = sorted(record)
                if isinstance(record.get("expert_load"), list) and draw.random() < 0.5:
                    values = record[draw.choice([name for name in names if isinstance(record[name], list)])]
                    values[draw.randrange(len(values))] = draw.choice(HOSTILE)
                elif draw.random() < 0.2:
                    del record[draw.choice(names)]
                else:
                    record[draw.choice(names)] = draw.choice(HOSTILE)
                lines[number] = json.dumps(record)
            except (ValueError, TypeError, AttributeError, IndexError):
                pass
    return "\n".join(lines) + "\n"


def test_damaged_files_of_a_run_lose_only_the_damaged_rows(tmp_path):
    """600 mutants of all files that a report reads, a few of which are also drawn."""
    draw = random.Random(7)
    blend = {"lr": 1e-3, "data_path": ["0.75", "data/web", "0.25", "data/code"]}
    save = write_run(tmp_path / "run", options=blend, corpora=("web", "code"), experts=of_experts)
    events = [
        {"type": "loss-spike", "time": 2.0, "step": 5, "message": "loss 9.1"},
        {"type": "straggler", "time": 3.0, "step": 7, "rank": 3},
    ]
    (save / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (state,) = save.glob("step-*/trainer_state.json")
    whole = {path: path.read_text() for path in (save / "metrics.jsonl", save / "events.jsonl", state)}
    for mutant in range(600):
        for path, text in whole.items():
            path.write_text(text)
        changes = draw.randrange(1, 4)
        for _ in range(changes):
            path = draw.choices(list(whole), [4, 1, 1])[0]
            path.write_text(mutated(draw, path.read_text()), errors="surrogatepass")
        history = read_history(save, "a</script>b")
        assert len(history.steps["step"]) >= 12 - 2 * changes, mutant
        json.dumps(asdict(history), allow_nan=False).encode()
        assert all(re.fullmatch(r"\w+\.jsonl: line \d+: .*; row left out", note) for note in history.notes if "jsonl" in note)
        if mutant % 60 == 0:
            assert Page(render([history], "t")).tags.count("script") == 2
            plot_runs([save], tmp_path / "loss.png", ["$\\frac{"])
        else:
            read_curve(save)


def test_the_largest_numbers_can_be_drawn(tmp_path):
    def change(records):
        for record, loss in zip(
            (record for record in records.values() if record["type"] == "evaluation"), [9e38, -9e38, 1.0, 0.0], strict=True
        ):
            record["token_loss"] = loss

    save = write_run(tmp_path / "run")
    rewritten(save, change)
    plot_runs([save], tmp_path / "loss.png")


def test_a_run_without_any_usable_file_is_an_error_in_three_parts(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" * 20)
    for read in (read_history, read_curve):
        with pytest.raises(DataError, match="contains no .*\n.*Allowed.*\n.*What to do"):
            read(tmp_path)


def test_long_runs_are_thinned_but_keep_edges_extremes_and_totals(tmp_path):
    save = write_run(tmp_path / "run", steps=1000)

    def change(records):
        for record in records.values():
            if record["type"] == "step" and record["step"] == 333:
                record["loss"], record["grad_norm"] = 50.0, 0.1
            if record["type"] == "step" and record["step"] == 777:
                record["loss"], record["grad_norm"] = -50.0, 99.0

    history = rewritten(save, change)
    assert history.thinned == 1 and history.steps["step"] == list(range(1, 1001))
    thinned = read_history(save, most_points=100)
    assert thinned.thinned > 1 and 25 <= len(thinned.steps["step"]) <= 110
    assert {1, 333, 500, 501, 777, 1000} <= set(thinned.steps["step"])
    for name, values in thinned.steps.items():
        whole = dict(zip(history.steps["step"], history.steps[name], strict=True))
        assert values == [whole[step] for step in thinned.steps["step"]], "values are exact"
    assert 25 <= len(thinned.evaluations["step"]) <= 110
    assert (thinned.stages, thinned.checkpoints, thinned.total_tokens) == (history.stages, history.checkpoints, history.total_tokens)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9)), max_size=200), st.integers(1, 60)
)
def test_thinning_keeps_the_extremes_of_each_stage_in_order(raw, most):
    rows = [(step, *values) for step, values in enumerate(sorted(raw, key=lambda values: values[0]))]
    thinning = Thinning(most, 1, 2, 3)
    for row in rows:
        thinning.add(row)
    kept = thinning.rows()
    assert [row[0] for row in kept] == sorted({row[0] for row in kept}) and set(kept) <= set(rows)
    assert len(kept) <= most + 20, "apart from the edges of three stages"
    for stage in {row[1] for row in rows}:
        mine, left = ([row for row in part if row[1] == stage] for part in (rows, kept))
        assert left[0] == mine[0] and left[-1] == mine[-1]
        for index, best in ((2, max), (2, min), (3, max)):
            values, found = ([row[index] for row in part if row[index] is not None] for part in (mine, left))
            assert best(values, default=None) == best(found, default=None)


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
    """The loss of run b on its only corpus is its held-out loss, which needs no second chart."""
    given = (("a", 0.0, ("web", "<b>")), ("b", 0.2, ("other",)))
    runs = [write_run(tmp_path / name, seed=seed, corpora=corpora) for name, seed, corpora in given]
    write_report(runs, tmp_path / "r.html")
    dom = open_page(tmp_path / "r.html", tmp_path / "profile")
    assert dom.count('<svg role="img"') == 11 and "created 20" in dom
    assert "Held-out: &lt;b&gt;" in dom and dom.count("50% of the held-out token loss") == 4
    assert dom.count('class="curve') >= 2 * 8 and dom.count('class="ring"') == 2 and "NaN" not in dom.split('<script id="data"')[0]
