"""What callbacks write: metrics with each step once, consoles that name both losses, TensorBoard."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from megatron_patch.config.resolve import load_config
from megatron_patch.errors import CheckpointError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.training.callbacks import jsonl_writer
from megatron_patch.training.callbacks.base import (
    CorpusLoss,
    Event,
    RunEnd,
    SaveRecord,
    SwitchRecord,
)
from megatron_patch.training.callbacks.charts import Charts, named_values
from megatron_patch.training.callbacks.console import Console
from megatron_patch.training.callbacks.metrics import Metrics, read_metrics
from megatron_patch.training.callbacks.tensorboard import TensorBoard
from megatron_patch.training.next_steps import next_steps
from megatron_patch.training.throughput import Throughput
from tests.training.records import EVALUATION, EXPERTS, START, STEP


def steps(path):
    return [record["step"] for record in read_metrics(path) if record["type"] == "step"]


def write(path, first, last, start):
    metrics = Metrics(path)
    metrics.on_start(replace(START, step=start))
    for step in range(first, last + 1):
        metrics.on_step(replace(STEP, step=step))
        metrics.on_evaluation(replace(EVALUATION, step=step))
    metrics.close()


def test_lines_are_valid_json_even_if_losses_are_not_finite(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.on_start(START)
    metrics.on_step(replace(STEP, loss=float("nan"), grad_norm=float("inf")))
    metrics.close()
    record = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert record["loss"] is None and record["loss_text"] == "nan" and record["grad_norm_text"] == "inf"


def test_loads_that_are_not_finite_are_valid_json(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.on_step(replace(STEP, **EXPERTS | {"router_entropy": (float("nan"), 0.5)}))
    metrics.on_step(STEP)
    metrics.close()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").read_text().splitlines())
    assert first["router_entropy"] == [None, 0.5] and first["expert_load"] == [1.25, 3.8] and first["expert_blocks"] == [1, 12]
    assert not second.keys() & EXPERTS.keys()


BLEND = replace(
    EVALUATION, corpora={"web": CorpusLoss(0.95, 6.25, 5.0, 500), "x/code_text_document_of_a_long_name": CorpusLoss(0.05, 11.25, 10.0, 500)}
)


def test_losses_of_corpora_that_are_not_finite_are_valid_json(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.on_evaluation(replace(BLEND, corpora={"web": CorpusLoss(1.0, float("nan"), 5.0, 500)}))
    metrics.close()
    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert record["corpora"]["web"] == {"weight": 1.0, "token_loss": None, "token_loss_text": "nan", "patch_loss": 5.0, "eval_tokens": 500}


def test_the_console_shows_each_corpus_in_80_columns():
    out = io.StringIO()
    console = Console(2, console=RichConsole(file=out, force_terminal=True, width=80, highlight=False, color_system=None))
    console.on_evaluation(BLEND)
    console.on_evaluation(replace(BLEND, patch_size=1))
    lines = out.getvalue().splitlines()
    assert lines[1:3] == [
        "         web                       95.0%  token loss 6.2500, patch loss 5.0000",
        "         x/code_text_…a_long_name   5.0%  token loss 11.2500, patch loss 10.0000",
    ]
    assert lines[4] == "         web                       95.0%  token loss 6.2500" and all(len(line) <= 80 for line in lines)


def test_a_single_corpus_is_shown_once():
    out = io.StringIO()
    record = replace(BLEND, corpora={"web": BLEND.corpora["web"]})
    Console(2, console=RichConsole(file=out, width=160)).on_evaluation(record)
    assert out.getvalue().count("\n") == 1 and set(named_values(record)) == {"eval/token_loss", "eval/patch_loss"}


def test_charts_have_each_corpus():
    values = named_values(BLEND)
    assert values["eval/token_loss"] == 6.5 and values["eval/token_loss/web"] == 6.25 and values["eval/patch_loss/web"] == 5.0
    assert "eval/patch_loss/web" not in named_values(replace(BLEND, patch_size=1))


def test_charts_have_the_worst_block_and_each_block():
    """Under names and numbers that MLflow, which is strict, takes."""
    values = {name: value for name, value in named_values(replace(STEP, **EXPERTS)).items() if name not in named_values(STEP)}
    assert values == {
        "train/expert_load": 3.8,
        "train/dead_experts": 5.0,
        "train/router_entropy": 0.5,
        "train/expert_load/block_1": 1.25,
        "train/expert_load/block_12": 3.8,
    }
    assert all(re.fullmatch(r"[\w/ .-]+", name) and type(value) is float for name, value in values.items())
    many = {name: tuple(range(1000)) for name in EXPERTS}
    assert len(named_values(replace(STEP, **many))) == len(named_values(STEP)) + 3 + 200


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_names_both_losses(terminal):
    out = io.StringIO()
    console = Console(2, console=RichConsole(file=out, force_terminal=terminal, width=180, highlight=False))
    console.on_start(START)
    for step in range(1, 5):
        console.on_step(replace(STEP, step=step, tokens=100 * step))
    console.on_evaluation(EVALUATION)
    console.on_switch(SwitchRecord(4, 1000, "patch", "token", 4, 1))
    console.on_save(SaveRecord(4, "x/step-4", 1.0, 2**20, 1.0))
    console.on_message("a sentence")
    console.on_end(RunEnd("done", 20, 2000, 100.0))
    console.close()
    text = out.getvalue()
    assert "token loss 6.5000 (K = 1)" in text and "patch loss 5.2500 (K = 4)" in text
    assert "(K = 4) -> token (K = 1)" in text and "x/step-4" in text and "a sentence" in text and "2k tokens" in text
    assert sum("5.5000" in line and "switch in" in line for line in text.splitlines()) >= 2


HOSTILE = "[bold]x[/nope]\x1b[2J\nexit code 0\u202e"
SHOWN = "[bold]x[/nope]\\x1b[2J\\nexit code 0\\u202e"


@pytest.mark.parametrize("width", [50, 80, 180])
@pytest.mark.parametrize("terminal", [False, True])
def test_text_of_others_is_neither_markup_nor_a_command(monkeypatch, terminal, width):
    """Stages, folders, corpora, samples, reasons and messages; also no sample is printed twice or below the live view."""
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    rich = RichConsole(file=out, force_terminal=terminal, force_interactive=False, width=width, highlight=False, color_system=None)
    console = Console(1, next_steps=[("report", f"python tools/report.py {HOSTILE}")], console=rich)
    console.on_start(START)
    console.on_step(replace(STEP, stage=HOSTILE))
    console.on_evaluation(replace(BLEND, corpora={HOSTILE: CorpusLoss(0.5, 6.25, 5.0, 500), "web": CorpusLoss(0.5, 6.25, 5.0, 500)}))
    console.show_samples(1, [f"prompt {HOSTILE}" + " a" * 40 * terminal, "second"], 0.1)
    console.on_switch(SwitchRecord(4, 1000, HOSTILE, HOSTILE, 4, 1))
    console.on_save(SaveRecord(4, HOSTILE, 1.0, 2**20, 1.0))
    console.on_event(Event("skip", 4, HOSTILE, {}))
    console.on_message(HOSTILE)
    console.on_end(RunEnd("done", 20, 2000, 100.0))
    text = out.getvalue()
    assert not re.search(r"\x1b\[2J|\u202e|\n *exit code 0", text)
    lines = re.sub(r"\s+", " ", text)
    for line in (f"4 saved {SHOWN} (1.0 MiB", f"skip: {SHOWN}", f"report python tools/report.py {SHOWN}"):
        assert line.replace(" ", "") in lines.replace(" ", "")
    if terminal:
        at = next(number for number, line in enumerate(text.splitlines()) if " sample: prompt" in line)
        assert width > 80 or text.splitlines()[at + 1].startswith(" " * 9), "the rest of a long sample is indented"
    else:
        assert f"1 sample: prompt [bold]x[/nope]\\x1b[2J exit code 0\\u202e 1 sample: second 4 switch: stage {SHOWN} (K = 4)" in lines
        assert text.count("second") == 1


def test_the_last_frame_has_the_last_losses_and_how_the_run_ended(monkeypatch):
    """A terminal keeps the last frame: the lines after it say what to do next."""
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    rich = RichConsole(file=out, force_terminal=True, width=80, highlight=False, color_system=None)
    console = Console(100, next_steps=[("evaluate", "python tools/evaluate.py --load x")], console=rich)
    console.on_start(START)
    console.on_step(replace(STEP, step=20, tokens=2000))
    console.on_evaluation(replace(EVALUATION, step=20, token_loss=3.2109))
    console.show_samples(20, ["Once upon\na time"], 0.1)
    console.on_end(RunEnd("done", 20, 2000, 100.0))
    console.close()
    frame, _, rest = out.getvalue().rpartition("ended")
    frame = frame[frame.rindex("step 20 of 20") :]
    assert "held-out token loss 3.2109" in frame
    rest = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", rest)
    assert "done after 1 min 40 s" in rest and "sample  Once upon a time" in rest
    assert rest.endswith(
        "      20 done: 2k tokens read, 1 min 40 s since this start\nNext\n  evaluate  python tools/evaluate.py --load x\n"
    )


@pytest.mark.parametrize(("width", "missing"), [(180, []), (80, ["MFU", "wait"]), (60, ["FLOPs", "grad", "MFU"]), (40, ["lr", "tok/s"])])
def test_the_lines_of_steps_fit_the_terminal(width, missing):
    out = io.StringIO()
    console = Console(1, console=RichConsole(file=out, force_terminal=True, force_interactive=False, width=width, color_system=None))
    console._start = START
    console.on_step(replace(STEP, step=999_999, tflops=0.000863, lr=2.345e-5))
    head, line = out.getvalue().splitlines()
    assert len(line) <= width and "5.5000" in line and not set(missing) & set(head.split())
    ends = [match.end() for match in re.finditer(r"\S+", head.partition("  to go")[0])]
    assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for end in ends if not head[:end].endswith("stage"))


def lines_of_steps(width, records):
    out = io.StringIO()
    console = Console(1, console=RichConsole(file=out, force_terminal=True, force_interactive=False, width=width, color_system=None))
    console._start = START
    for record in records:
        console.on_step(record)
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("width", "missing"), [(180, ""), (120, ""), (80, "FLOPs MFU"), (72, "FLOPs experts"), (40, "experts grad lr")])
def test_the_worst_block_is_a_column_where_there_is_room(width, missing):
    head, line = lines_of_steps(width, [replace(STEP, step=999_999, **EXPERTS)])
    assert len(line) <= width and not set(missing.split()) & set(head.split())
    assert ("experts" in head) == (width >= 80) == ("3.8 @12" in line)
    if width >= 80:
        end = head.index("experts") + len("experts")
        assert line[:end].endswith(" 3.8 @12") and line[end] == " ", "numbers are below their names"


def test_loads_of_any_size_keep_the_columns_aligned():
    loads = [(1.0, 1.25), (128.0, 1.0), (float("nan"), 31.96), (float("nan"), float("nan"))]
    records = [replace(STEP, **EXPERTS | {"expert_blocks": (3, 127), "expert_load": pair}) for pair in loads]
    head, *lines = lines_of_steps(160, records)
    end = head.index("experts") + len("experts")
    assert [line[:end].split()[-2:] for line in lines] == [["1.2", "@127"], ["128", "@3"], ["32.0", "@127"], ["nan", "@3"]]
    assert {len(line) for line in lines} == {len(lines[0])} and len(head) <= 160 and max(map(len, lines)) <= 160


def test_lines_of_a_model_without_experts_are_those_of_before():
    head, line = lines_of_steps(180, [STEP])
    assert re.sub(" +", " ", head) == " step stage K tokens loss lr grad tok/s pos/s TFLOP/s MFU GiB wait FLOPs to go"
    assert line == (
        "       1 patch       4      100   5.5000     0.001   0.900      1k     250     0.1      -   1.5 10.0%   2.5%  switch in 1 s, end in 0 s"
    )


def test_the_end_names_the_tools_that_read_the_run(tmp_path, monkeypatch):
    """With its folder and held-out data, as a shell takes them; a stopped run is resumed first."""
    save, held_out = tmp_path / "my run", str(tmp_path / "held out")
    base = [
        "--num-layers",
        "1",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
        "--dry-run",
        "--train-tokens",
        "4200",
        "--global-batch-size",
        "4",
    ]
    base += ["--vocab-size", "64", "--seq-length", "16", "--micro-batch-size", "1", "--save", str(save)]
    run = load_config([*base, "--data-path", "x", "--valid-data-path", held_out], 1)
    steps = dict(next_steps(run))
    assert list(steps) == ["evaluate", "report", "convert"], "without a metadata file, no tokenizer is known that decodes ids"
    assert shlex.split(steps["evaluate"])[-4:] == ["--load", str(save), "--data-path", held_out]
    assert shlex.split(steps["report"])[-3:] == [str(save), "--output", str(save / "report.html")]
    assert shlex.split(steps["convert"])[-5:] == ["to-hf", "--load", str(save), "--output", str(save / "hugging_face")]
    assert all(Path(shlex.split(command)[1]).is_file() for command in steps.values())
    experts = ExpertShape(4, 2, 16, bias=True)
    assert "convert" not in dict(next_steps(replace(run, shape=replace(run.shape, experts=experts)))), "no export has such a bias"
    with_text = replace(run, data_metadata=SimpleNamespace(tokenizer_type="HuggingFaceTokenizer"), options=load_config(base, 1).options)
    assert {name: command.split()[-1] for name, command in next_steps(with_text)}["evaluate"] == "FILE", "its data was trained on"
    assert "generate" in dict(next_steps(with_text))
    out = io.StringIO()
    console = Console(1, next_steps=next_steps(run), console=RichConsole(file=out, width=180))
    console.on_end(RunEnd("SIGTERM", 20, 2000, 100.0))
    assert "tools/" not in out.getvalue() and "stopped (SIGTERM)" in out.getvalue()


def test_tensorboard_has_the_same_names_over_tokens(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Charts(TensorBoard(str(tmp_path)), None)
    board.on_start(START)
    board.on_step(STEP)
    board.on_evaluation(EVALUATION)
    board.on_step(replace(STEP, stage="token", stage_index=1, patch_size=1, tokens=200, loss=4.5))
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    once = {"train/patch_loss": (100, 5.5), "train/token_loss": (200, 4.5), "eval/token_loss": (100, 6.5), "eval/patch_loss": (100, 5.25)}
    for name, expected in once.items():
        (scalar,) = events.Scalars(name)
        assert (scalar.step, scalar.value) == expected
    both = {*named_values(STEP), *named_values(replace(STEP, patch_size=1)), *named_values(EVALUATION)}
    assert set(events.Tags()["scalars"]) == both
    assert [scalar.step for scalar in events.Scalars("train/lr")] == [100, 200]


@pytest.mark.parametrize("resumed_at", [0, 100])
def test_tensorboard_has_each_step_once_after_a_kill(tmp_path, resumed_at):
    """Also if the kill came before the first checkpoint, so that the run starts again at 0 tokens."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 5.0), (resumed_at, 4.0)):
        board = Charts(TensorBoard(str(tmp_path)), None)
        board.on_start(replace(START, tokens=start))
        for tokens in range(start + 100, 400, 100):
            board.on_step(replace(STEP, tokens=tokens, loss=loss))
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("train/patch_loss")]
    assert found == [(100, 4.0 if resumed_at == 0 else 5.0), (200, 4.0), (300, 4.0)]


def test_charts_use_the_field_names_of_the_records():
    names = {name.partition("/")[2] for name in named_values(STEP)} - {"patch_loss"}
    assert names <= set(asdict(STEP)) and {name.partition("/")[2] for name in named_values(EVALUATION)} <= set(asdict(EVALUATION))
    assert "eval/patch_loss" not in named_values(replace(EVALUATION, patch_size=1))


def test_rates_are_those_of_the_window():
    meter = Throughput(2, "NVIDIA H100 80GB HBM3", window=2)
    meter.update(100.0, 0.0, 1, 1, 1.0)
    meter.update(1.0, 0.25, 100, 25, 1e12)
    rates = meter.update(3.0, 0.75, 300, 75, 3e12)
    assert rates.tokens_per_second == 100.0 and rates.positions_per_second == 25.0
    assert rates.tflops == pytest.approx(0.5) and rates.mfu == pytest.approx(0.5 / 989.4) and rates.data_share == pytest.approx(0.25)
    assert Throughput(1, "cpu").update(1.0, 0.0, 1, 1, 1.0).mfu is None
    assert Throughput(1, "cpu", peak_tflops=1.0).update(1.0, 0.0, 1, 1, 5e11).mfu == pytest.approx(0.5)


def test_lines_that_a_full_disk_refuses_wait_for_space(tmp_path, monkeypatch, capsys):
    """A write that fails, and one that ends in the middle of a line: neither ends the run, and no line is lost or damaged."""
    write_all, room = os.write, 10_000

    def write(file, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write_all(file, data[:room])
        room -= count
        return count

    monkeypatch.setattr(jsonl_writer.os, "write", write)
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.on_start(START)
    room = 700
    for step in range(1, 6):
        metrics.on_step(replace(STEP, step=step))
    assert (tmp_path / "m.jsonl").stat().st_size < 10_000 and steps(tmp_path / "m.jsonl") == [1], "the second line is incomplete"
    assert capsys.readouterr().err.count("No space left on device; its lines wait") == 1
    room = 1_000_000
    metrics.on_step(replace(STEP, step=6))
    assert "no line was lost" in capsys.readouterr().err and steps(tmp_path / "m.jsonl") == list(range(1, 7))
    room = 0
    metrics.on_step(replace(STEP, step=7))
    metrics.close()
    assert "1 line lost" in capsys.readouterr().err
    monkeypatch.setattr(jsonl_writer, "_LARGEST_BACKLOG", 100)
    metrics = Metrics(tmp_path / "m.jsonl")
    with pytest.raises(CheckpointError, match="No space left on device"):
        metrics.on_step(replace(STEP, step=8))
