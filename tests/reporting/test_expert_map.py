"""The heat map of experts: no spike disappears in a long run, damaged rows are named, and a browser draws it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.reporting import page
from megatron_patch.reporting.expert_map import ExpertMap
from megatron_patch.reporting.history import read_history
from megatron_patch.reporting.page import render, write_report
from tests.reporting.browser import CHROMIUM, MISSING, open_page
from tests.reporting.test_report import Page, of_experts, rewritten, write_run

OPTIONS = {"num_experts": 8, "moe_router_topk": 2}


def test_the_page_has_the_load_of_each_block_and_step(tmp_path):
    save = write_run(tmp_path / "run", options=OPTIONS, experts=of_experts)
    found = Page(render([read_history(save)], "t")).data["runs"][0]["experts"]
    steps = range(1, 13)
    assert (found["blocks"], found["experts"], found["most"], found["steps_per_column"]) == ([1, 3], 8, 4.0, 1)
    assert found["load"] == [[1.0 + step / 100 for step in steps], [3.5] * 12]
    assert found["dead"] == [[0] * 12, list(steps)] and found["entropy"] == [[2] * 12, [1.5] * 12]
    assert found["begin"]["step"] == list(range(12)) and found["end"]["step"] == list(steps) and found["patch_size"] == [4] * 6 + [1] * 6
    tokens = [400 * min(step, 6) + 100 * max(0, step - 6) for step in range(13)]
    assert (found["begin"]["tokens"], found["end"]["tokens"]) == (tokens[:-1], tokens[1:])
    assert found["end"]["cost_tokens"] == [100.0 * step for step in steps] and found["begin"]["cost_tokens"][0] == 0


def test_a_run_without_experts_has_no_map(tmp_path):
    text = render([read_history(write_run(tmp_path / "run", options={"num_experts": None, "moe_router_topk": 2}))], "t")
    assert Page(text).data["runs"][0]["experts"] is None and '<section id="experts" class="grid" hidden>' in text


def test_a_run_that_got_no_fields_of_experts_at_first_has_a_gap(tmp_path):
    """Steps without them (None), with one that is not finite, and after a row that is left out."""

    def change(records):
        for record in records.values():
            if record["type"] == "step" and record["step"] == 2:
                record["expert_load"] = [None, 3.5]
            if record["type"] == "step" and record["step"] in (5, 6):
                for name in of_experts(1):
                    del record[name]
            if record["type"] == "step" and record["step"] == 9:
                record["loss"] = "low"

    history = rewritten(write_run(tmp_path / "run", experts=of_experts), change)
    assert history.experts["end"]["step"] == [1, 2, 3, 4, 7, 8, 10, 11, 12]
    assert history.experts["begin"]["step"] == [0, 1, 2, 3, 6, 7, 8, 10, 11] and history.experts["load"][0][1] is None
    assert history.experts["most"] is None and len(history.steps["step"]) == 11


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"expert_load": 3.5}, "expert_load is 3.5"),
        ({"expert_load": None}, "expert_load is missing"),
        ({"expert_load": [1.0, "2"]}, "a value of expert_load is text"),
        ({"expert_load": [1.0, -1.0]}, "a value of expert_load is -1.0"),
        ({"expert_load": [1.0, 1e300]}, "a value of expert_load is 1e+300"),
        ({"expert_load": [1.0, True]}, "a value of expert_load is true or false"),
        ({"dead_experts": [[], {}]}, "a value of dead_experts is a list"),
        ({"dead_experts": [0.5, 1]}, "a value of dead_experts is 0.5"),
        ({"expert_blocks": [1, None]}, "a value of expert_blocks is missing"),
        ({"expert_blocks": [1, 10_000]}, "a value of expert_blocks is 10000"),
        ({"expert_blocks": [3, 1]}, "the numbers of expert_blocks are not in ascending order"),
        ({"expert_blocks": [3, 3]}, "the numbers of expert_blocks are not in ascending order"),
        ({"expert_blocks": []}, "the lists expert_blocks, expert_load, dead_experts, router_entropy have 0, 2, 2, 2 values"),
        ({"router_entropy": [1.0]}, "the lists expert_blocks, expert_load, dead_experts, router_entropy have 2, 2, 2, 1 values"),
        (
            dict(zip(of_experts(1), (list(range(2000)), *([1] * 2000 for _ in range(3))), strict=True)),
            "the lists expert_blocks, expert_load, dead_experts, router_entropy have 2000, 2000, 2000, 2000 values",
        ),
    ],
    ids=str,
)
def test_a_step_with_damaged_fields_of_experts_is_left_out_and_named(tmp_path, fields, what):
    def change(records):
        (line,) = (line for line, record in records.items() if record.get("step") == 4 and record["type"] == "step")
        records[line].update(fields)

    history = rewritten(write_run(tmp_path / "run", experts=of_experts), change)
    assert history.notes[0] == f"metrics.jsonl: line 6: {what}; row left out" and len(history.notes) == 2
    assert history.experts["end"]["step"] == history.steps["step"] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    "options", [{}, {"num_experts": "8"}, {"num_experts": 8}, {"num_experts": 8, "moe_router_topk": 0}, {"num_experts": True}], ids=str
)
def test_damaged_options_leave_the_largest_load_unknown(tmp_path, options):
    history = read_history(write_run(tmp_path / "run", options=options, experts=of_experts))
    assert history.experts["most"] is None and history.experts["experts"] is None


Cell = st.none() | st.floats(0, 9)
Steps = st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5), min_size=1), st.lists(Cell, min_size=6, max_size=6)), max_size=80)


@given(Steps, st.integers(1, 12), st.integers(1, 40))
def test_columns_keep_the_worst_of_their_steps(raw, most_columns, most_cells):
    """Compared with a search in all steps; also if the blocks of a run change."""
    loads = ExpertMap(most_columns, most_cells)
    steps = sorted(raw, key=lambda step: step[0])
    place = [(n, 10 * n, 2.0 * n, 0.5 * n) for n in range(len(steps) + 1)]
    for n, (stage, blocks, values) in enumerate(steps):
        mine = [values[block] for block in sorted(blocks)]
        dead = [None if value is None else 9 - value for value in mine]
        loads.add(stage, 4 - stage, place[n], place[n + 1], (sorted(blocks), mine, dead, mine))
    found = loads.as_record(None, None)
    if not steps:
        assert found is None
        return
    json.dumps(found, allow_nan=False)
    assert found["blocks"] == sorted({block for _, blocks, _ in steps for block in blocks})
    begins, ends = found["begin"]["step"], found["end"]["step"]
    assert begins[0] == 0 and ends[-1] == len(steps) and begins[1:] == ends[:-1], "the columns cover the run"
    for column, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        part = steps[begin:end]
        assert len({stage for stage, _, _ in part}) == 1 and found["patch_size"][column] == 4 - part[0][0]
        assert len(part) <= found["steps_per_column"]
        for row, block in enumerate(found["blocks"]):
            values = [values[block] for _, blocks, values in part if block in blocks and values[block] is not None]
            expected = (max(values, default=None), 9 - min(values) if values else None, min(values, default=None))
            for name, value in zip(("load", "dead", "entropy"), expected, strict=True):
                assert found[name][row][column] == (None if value is None else pytest.approx(value, abs=6e-4)), name
    assert len(ends) <= max(1, min(most_columns, most_cells // len(found["blocks"]))) * 5 // 4 + 4


def test_a_spike_in_a_long_run_is_kept_and_the_map_stays_small(tmp_path):
    def spiked(step):
        return of_experts(1) | {"expert_load": (1.1, 15.5 if step == 1234 else 1.2), "dead_experts": (0, 7 if step == 1717 else 1)}

    found = read_history(write_run(tmp_path / "run", steps=2000, experts=spiked)).experts
    columns = found["end"]["step"]
    assert 300 <= len(columns) <= 602 and found["steps_per_column"] == 4
    (spike,) = (n for n, load in enumerate(found["load"][1]) if load > 1.2)
    assert found["load"][1][spike] == 15.5 and found["begin"]["step"][spike] < 1234 <= columns[spike]
    assert found["dead"][1].count(7) == 1 and 1000 in columns, "no column crosses the switch"


def test_many_blocks_have_fewer_columns():
    loads = ExpertMap()
    draw = random.Random(0)
    blocks, values = list(range(1000)), [draw.random() for _ in range(1000)]
    for n in range(200):
        loads.add(0, 4, (n, n, 0.0, 0.0), (n + 1, n + 1, 0.0, 0.0), (blocks, values, values, values))
    assert len(loads.as_record(512, 8)["end"]["step"]) <= 40


def luminance(color):
    """Relative luminance of a color such as #80ff00 (WCAG 2.1)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def simulated(color, kind):
    """The color as seen without one kind of cones (Machado, Oliveira and Fernandes 2009, severity 1), in linear light."""
    matrix = {
        "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    }[kind]
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return [min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in matrix]


def test_the_levels_differ_in_brightness():
    """In every theme, each level is brighter or darker than the one before by at least 20 %, also for color-blind readers."""
    ramps = re.findall(r"--h0: .*", page._asset("report.css"))
    assert len(ramps) == 3, "light, dark, print"
    for ramp in ramps:
        colors = re.findall(r"#[0-9a-f]{6}", ramp)
        assert len(colors) == 7
        seen = [[luminance(color) for color in colors]]
        for kind in ("protan", "deutan", "tritan"):
            seen.append([0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (simulated(color, kind) for color in colors)])
        for values in seen:
            ratios = [(a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(values)]
            assert all(ratio >= 1.2 for ratio in ratios) or all(ratio <= 1 / 1.2 for ratio in ratios), (ramp, ratios)


HOVER = """
(() => {
  const svg = document.querySelector("#experts svg"), frame = svg.getBoundingClientRect();
  const at = { clientX: frame.left + 50 + (frame.width - 62) * 0.99, clientY: frame.top + 24 + 10, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
})();
"""


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_draws_the_map_and_shows_a_cell(tmp_path, monkeypatch):
    """Of three runs, one has no experts. The pointer is on the upper row of the first map, block 3, in its last column."""
    runs = [
        write_run(tmp_path / "a", options=OPTIONS, experts=of_experts),
        write_run(tmp_path / "b"),
        write_run(tmp_path / "<c>", experts=lambda step: of_experts(step) | {"expert_load": (1.0, math.nan)}),
    ]
    asset = page._asset
    monkeypatch.setattr(page, "_asset", lambda name: asset(name) + HOVER * (name == "report.js"))
    write_report(runs, tmp_path / "r.html")
    dom = open_page(tmp_path / "r.html", tmp_path / "profile").split('<script id="data"')[0]
    assert "Load of experts: a" in dom and "Load of experts: &lt;c&gt;" in dom and "Load of experts: b" not in dom
    assert "3.3 to 4 (possible)" in dom and "(largest so far)" in dom and "NaN" not in dom
    # Loads 1.01 to 1.12 and 3.5 of at most 4 are of the lowest and of the highest level; NaN of block 3 is of none.
    assert re.findall(r'class="cell" d="[^"]+" fill="var\((--h\d)\)"', dom) == ["--h0", "--h6", "--h0"]
    assert dom.count('class="turn"') == 2
    tip = dom[dom.index('<div id="tip"') :]
    for words in ("a, block 3", "3.50 × mean", "12 dead experts of 8", "entropy of the router 1.50 nats", "K = 1 · step 12 · 3k tokens"):
        assert words in tip, words
