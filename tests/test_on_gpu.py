"""The GPU schedule: steps that hang, die or end early, the budget, the archive, and the tables in the documents."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from megatron_patch.errors import ConfigError
from megatron_patch.utils.markdown import replace_between

ROOT = Path(__file__).parent.parent


@pytest.fixture
def modules(monkeypatch):
    """Benchmarks import each other by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(name)


def run(modules, folder, steps, budget=60.0):
    schedule = modules("_schedule")
    text = io.StringIO()
    packed = folder / "packed.tar.gz"
    made = schedule.Schedule(
        [schedule.Step(**step) for step in steps], folder / "call", budget, packed, Console(file=text, width=80, highlight=False)
    )
    made.run()
    made.print_table()
    with tarfile.open(packed) as archive:
        outcomes = {entry["name"]: entry for entry in json.load(archive.extractfile("call/steps.json"))}
        names = archive.getnames()
    return outcomes, names, text.getvalue(), packed


def test_a_step_that_hangs_dies_or_fails_affects_no_other(modules, tmp_path):
    left = tmp_path / "left"
    steps = [
        {"name": "hangs", "command": f"trap '' TERM; echo begun; (sleep 600; touch {left}) & sleep 600", "limit": 1},
        {"name": "dies", "command": "echo last words; kill -9 $$", "limit": 20},
        {"name": "fails", "command": "echo why >&2; exit 3", "limit": 20, "needs": ("dies", "no such step")},
        {"name": "leaves", "command": "sleep 601 & echo done", "limit": 20},
        {
            "name": "works",
            "command": 'echo 1 >"$RESULTS/one.png"; echo "{\\"kind\\": \\"x\\"}" >>"$FIGURES"',
            "limit": 20,
            "gpu": "exclusive",
        },
    ]
    began = time.monotonic()
    outcomes, names, text, packed = run(modules, tmp_path, steps)
    assert time.monotonic() - began < 30
    assert {name: entry["status"] for name, entry in outcomes.items()} == {
        "hangs": "timed out",
        "dies": "failed",
        "fails": "failed",
        "leaves": "passed",
        "works": "passed",
    }
    assert outcomes["hangs"]["last_lines"] == ["begun", "killed at its limit of 1 s"]
    assert outcomes["dies"]["last_lines"] == ["last words"] and outcomes["fails"]["code"] == 3
    assert {"call/logs/hangs.log", "call/files/works/one.png", "call/figures.jsonl"} <= set(names)
    assert not left.exists()
    # Nothing of what they left is alive: their processes hold these numbers as arguments.
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(command in (b"sleep\x00600\x00", b"sleep\x00601\x00") for command in commands)
    for word in ("timed out", "failed, killed by SIGKILL", "failed, exit code 3", "passed", "last words", "why"):
        assert word in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_steps_beyond_the_budget_are_not_reached(modules, tmp_path):
    steps = [
        {"name": "long", "command": "echo $STEP_SECONDS seconds; sleep 60", "limit": 60, "least": 1},
        {"name": "too late", "command": "true", "limit": 60, "least": 5},
        {"name": "short", "command": "true", "limit": 60, "least": 0.1},
    ]
    outcomes, _, text, _ = run(modules, tmp_path, steps, budget=3)
    assert [entry["status"] for entry in outcomes.values()] == ["timed out", "not reached", "passed"] or [
        entry["status"] for entry in outcomes.values()
    ] == ["timed out", "not reached", "not reached"]
    assert "not reached" in text
    assert outcomes["long"]["last_lines"][0] == "2 seconds", "what is left of the budget"


def test_a_measurement_has_exclusive_use_of_the_gpu_while_cpu_work_runs(modules, tmp_path):
    span = "date +%s.%N >>$RESULTS/span; sleep 1; date +%s.%N >>$RESULTS/span"
    steps = [
        {"name": "test-1", "command": span, "limit": 20},
        {"name": "test-2", "command": span, "limit": 20},
        {"name": "timed", "command": span, "limit": 20, "gpu": "exclusive"},
        {"name": "test-3", "command": span, "limit": 20},
        {"name": "processors", "command": span, "limit": 20, "gpu": "none"},
    ]
    run(modules, tmp_path, steps)
    spans = {
        step["name"]: [float(line) for line in (tmp_path / "call" / "files" / step["name"] / "span").read_text().split()] for step in steps
    }

    def apart(one, other):
        return spans[one][1] <= spans[other][0] or spans[other][1] <= spans[one][0]

    assert not apart("test-1", "test-2") and not apart("processors", "test-1")
    assert all(apart("timed", other) for other in ("test-1", "test-2", "test-3"))
    assert spans["test-3"][0] >= spans["timed"][1]


def test_a_figure_that_is_not_finite_fails_its_step_and_is_named(modules, tmp_path):
    script = "from _measure import record; record('kernel', ms=float('nan'), rows=[{'share': float('inf')}], good=1.0)"
    command = f'PYTHONPATH={ROOT}/benchmarks:{ROOT} {sys.executable} -c "{script}"'
    outcomes, _, text, _ = run(modules, tmp_path, [{"name": "measures", "command": command, "limit": 60}])
    assert outcomes["measures"]["status"] == "failed" and "a figure is NaN or infinite" in outcomes["measures"]["last_lines"]
    (figure,) = modules("_schedule").read_figures(tmp_path / "call" / "figures.jsonl")
    assert figure["not_finite"] == ["ms", "rows.0.share"] and figure["ms"] is None and figure["good"] == 1.0


def test_tests_that_were_all_skipped_have_not_passed(modules, tmp_path):
    steps = [
        {"name": "none", "command": "echo; echo '55 skipped in 9.75s'", "limit": 20},
        {"name": "some", "command": "echo '3 passed, 2 skipped in 1.0s'", "limit": 20},
    ]
    outcomes, _, _, _ = run(modules, tmp_path, steps)
    assert [outcome["status"] for outcome in outcomes.values()] == ["skipped", "passed"]


def test_large_files_are_skipped_and_reported(modules, tmp_path):
    steps = [{"name": "writes", "command": "head -c 9000000 /dev/zero >$RESULTS/trace.json; echo 1 >$RESULTS/small", "limit": 20}]
    _, names, text, _ = run(modules, tmp_path, steps)
    assert "call/files/writes/small" in names and "call/files/writes/trace.json" not in names
    assert "trace.json" in text


@pytest.fixture(scope="module")
def tiny_call(tmp_path_factory):
    """The whole schedule with tiny shapes on the CPU, a step that hangs at its start and one that dies in its middle: (exit code, folder)."""
    folder = tmp_path_factory.mktemp("call")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name, value in {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OUT": str(folder), "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        module, schedule = importlib.import_module("on_gpu"), importlib.import_module("_schedule")
        hangs = schedule.Step("hangs", "true", limit=0.5, gpu="exclusive", tiny="echo begun; sleep 600")
        dies = schedule.Step("dies", "true", limit=9, gpu="exclusive", tiny="echo last words; kill -9 $$")
        steps = [hangs, *module.FIRST[:-2], dies, *module.FIRST[-2:]]
        patch.setattr(module, "FIRST", steps)
        code = module.main(["first", "study", "--tiny", "--output", str(folder / "runs")])
    (packed,) = folder.glob("on_gpu-steps-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "packed", filter="data")
    (call,) = (folder / "packed").iterdir()
    return code, call


def figures_of(call, kind):
    lines = (call / "figures.jsonl").read_text().splitlines()
    return [figure for figure in map(json.loads, lines) if figure["kind"] == kind]


def test_the_whole_schedule_runs_whatever_becomes_of_a_step(tiny_call):
    code, call = tiny_call
    outcomes = {entry["name"]: entry for entry in json.loads((call / "steps.json").read_text())}
    status = {name: entry["status"] for name, entry in outcomes.items()}
    assert code == 1 and status.pop("hangs") == "timed out" and status.pop("dies") == "failed"
    run_here = ("device", "build", "loss", "linear", "embedding", "eager", "attention", "text", "study")
    assert {name for name, what in status.items() if what == "passed"} == set(run_here), outcomes
    assert {what for name, what in status.items() if name not in run_here} == {"skipped"}
    assert all((call / "logs" / f"{name}.log").is_file() for name in run_here)
    kernels = figures_of(call, "kernel")
    assert {figure["operator"] for figure in kernels} == {"multi_token_loss", "patch_embedding", "linear_multi_token_loss"}
    assert all(figure["error"] < 1e-2 for figure in kernels if figure["peer"].startswith("ours"))
    assert len(figures_of(call, "machine")) == 1 and not figures_of(call, "kernel_failed")
    runs = {(figure["step"], figure["name"]): figure for figure in figures_of(call, "run")}
    assert {step for step, _ in runs} == {"text", "study"} and all(figure["held_out_loss"] > 1 for figure in runs.values())
    assert (call / "files" / "text" / "text_run.png").stat().st_size > 10_000


def test_a_step_is_measured_in_both_stages_without_a_checkpoint(tiny_call):
    _, call = tiny_call
    patch, token = figures_of(call, "training")
    assert (patch["stage"], patch["patch_size"], token["stage"], token["patch_size"]) == ("patch", 4, "token", 1)
    assert patch["steps"] == token["steps"] == len(patch["step_seconds_all"]) == 3
    # Rates are of the same positions: 2 micro-batches of 2 samples of 64.
    for figure, tokens in ((patch, 1024), (token, 256)):
        assert figure["tokens_per_second"] * figure["step_seconds"] == pytest.approx(tokens)
        assert figure["positions_per_second"] * figure["step_seconds"] == pytest.approx(256)
        assert 5 < figure["loss_first"] < 8 and figure["planned_seconds"] > 0 and figure["planned_memory_gib"] > 0
    assert patch["tflops"] * patch["step_seconds"] == pytest.approx(token["tflops"] * token["step_seconds"])
    profiles = figures_of(call, "profile")
    assert [profile["stage"] for profile in profiles] == ["patch", "token"]
    for profile in profiles:
        assert 0 < profile["busy_share"] <= 1 and len(profile["rows"]) == 30
        assert [row["cuda_ms"] for row in profile["rows"]] == sorted((row["cuda_ms"] for row in profile["rows"]), reverse=True)
        trace = call / "files" / "eager" / f"trace-eager-{profile['stage']}.json.gz"
        assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 100
    assert not list(call.rglob("*.safetensors")) and not list(call.rglob("step-*/"))


def test_attention_names_the_backend_that_torch_chooses_and_continues_without_a_missing_one(tiny_call):
    _, call = tiny_call
    found = {figure["backend"]: figure for figure in figures_of(call, "attention")}
    assert list(found) == ["flash", "cudnn", "efficient", "math"]
    assert [name for name, figure in found.items() if figure["chosen"]] == ["flash"]
    assert found["flash"]["forward_backward_ms"] > 0 and found["math"]["tflop_per_second"] > 0
    assert found["cudnn"]["tflop_per_second"] is None and "viable" in found["cudnn"]["error"]
    ceilings = {figure["name"] for figure in figures_of(call, "ceiling") if figure["step"] == "attention"}
    assert ceilings == {"copy_gb_per_second", "product_tflop_per_second"}


FIGURES = [
    {"kind": "ceiling", "name": "copy_gb_per_second", "value": 4321.0, "unit": "GB/s", "when": "before"},
    {"kind": "ceiling", "name": "copy_gb_per_second", "value": 4300.0, "unit": "GB/s", "when": "after"},
    *(
        {
            "kind": "kernel",
            "operator": "multi_token_loss",
            "rows": 8192,
            "vocab": 128_256,
            "hidden": None,
            "patch_size": 4,
            "dtype": "bfloat16",
            "peer": peer,
            "forward_ms": None,
            "forward_backward_ms": ms,
            "gb_per_second": 4202.7 / ms,
            "share_of_ceiling": 0.9 / ms,
            "peak_mb": None,
            "error": 2e-3,
        }
        for peer, ms in (
            ("papers' code, eager", 36.0),
            ("ours, loss and gradient in one go", 1.5),
            ("ours, loss and gradient in one go", 1.25),
        )
    ),
    {
        "kind": "training",
        "variant": "compiled",
        "stage": "patch",
        "patch_size": 4,
        "parameters": 1_300_000_000,
        "seq_length": 2048,
        "micro_batch_size": 8,
        "micro_batches": 4,
        "steps": 8,
        "step_seconds": 1.25,
        "planned_seconds": 1.0,
        "tokens_per_second": 210_000.0,
        "positions_per_second": 52_500.0,
        "tflops": 494.5,
        "mfu": 0.5,
        "memory_gib": 80.0,
        "planned_memory_gib": 76.0,
        "loss_first": 10.4,
        "loss_last": 9.0,
    },
    *(
        {
            "kind": "documents",
            "seq_length": 8192,
            "mix": "web text",
            "peer": peer,
            "documents": 14,
            "longest": 2700,
            "forward_backward_ms": 16.0 / speed,
            "speed_of_plain": speed,
            "peak_mb": 70.5,
            "error": error,
        }
        for peer, speed, error in (("plain causal", 1.0, None), ("dense mask", 0.25, None), ("ours", 3.2, 4e-3))
    ),
    {
        "kind": "profile",
        "variant": "compiled",
        "stage": "patch",
        "busy_share": 0.97,
        "rows": [{"name": "gemm", "cuda_ms": 9.0, "share": 0.5, "calls": 3}],
    },
    *(
        {
            "kind": "run",
            "step": "study",
            "name": "patches",
            "seed": seed,
            "patch_sizes": [4, 1],
            "tokens": 2e7,
            "cost": 1e7,
            "steps": 1500,
            "seconds": 40.0,
            "held_out_loss": loss,
            "parameters": 2e7,
            "ended": "done",
        }
        for seed, loss in ((1, 3.5), (2, 3.7))
    ),
]


def made_call(modules, monkeypatch, folder, figures, *words):
    """The archive of a real call of two steps, which record these figures, a plot, and a failure."""
    folder.mkdir()
    lines = folder / "lines"
    lines.write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    module, schedule = modules("on_gpu"), modules("_schedule")
    record = f"cat {lines} >>$FIGURES; echo 1 >$RESULTS/loss.png"
    steps = [schedule.Step("device", record, limit=20, tiny=record), schedule.Step("fails", "exit 1", limit=9)]
    monkeypatch.setattr(module, "FIRST", steps)
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.chdir(folder)  # which the call leaves, and the test's end restores
    assert module.main(["first", "--output", str(folder / "runs"), *words]) == ("--tiny" not in words)
    return folder / "on_gpu-first.tar.gz"


MACHINE = {"kind": "machine", "date": "2026-01-02", "gpu": "NVIDIA X100", "torch": "2.11.0", "python": "3.12.3", "processor": "a CPU"}


def test_a_call_is_recorded_and_rendered(modules, tmp_path, monkeypatch):
    packed = made_call(modules, monkeypatch, tmp_path / "one", [MACHINE, *FIGURES])
    render = modules("render_gpu")
    call = render.record_call(packed, tmp_path / "results")
    assert call.name.startswith("gpu-nvidia-x100-2") and call.name.endswith("-first")
    assert sorted(path.name for path in call.iterdir()) == ["call.json", "figures.jsonl", "loss.png", "steps.json"]
    calls = render.newest_calls(tmp_path / "results")
    text = render.results_text(calls)
    assert "1.250 | 1.00" in text and "1.500" not in text, "of two figures of the same the later one counts"
    assert "36.000 | 28.80" in text, "a peer's time over ours"
    assert "8,192 | web text | 14 | 2,700 | dense mask | 64.000 | 0.25 | 70.5 | - |" in text
    assert "ours | 5.000 | 3.20 | 70.5 | 4.0e-03 |" in text
    assert "50.0% | 1.250 | 0.80 | 80.0 | 0.95" in text and "97% of the time" in text
    assert "1 of 1 step times within 30%; 1 of 1 peaks of memory within 10%" in text
    assert "4,321 | before" in text and "4,300 | after" in text
    assert "4 → 1 | 2 | 20.0 | 10.0 | 1,500 | 3.600 ± 0.141 | 40 | done" in text, "seeds are one row"
    assert "| `fails` | failed |" in text and "one NVIDIA X100" in text and "2026-01-02" in text
    sentence = render.readme_text(calls)
    assert "1.25 ms" in sentence and "50% MFU" in sentence and "36.0" in sentence
    document = tmp_path / "page.md"
    document.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    after = replace_between(document, render.BEGIN, render.END, "new\n")
    assert "old" not in after and after.startswith("before\n") and after.endswith("\nafter\n") and "new" in after
    document.write_text("no markers")
    with pytest.raises(ConfigError, match="needs the lines"):
        replace_between(document, render.BEGIN, render.END, "new")
    results = tmp_path / "results"
    whole = packed.read_bytes()
    for damaged in (b"no archive", whole[:20], whole[: len(whole) // 2], whole[:-6], whole[:60] + bytes(8) + whole[68:]):
        document.write_bytes(damaged)
        with pytest.raises(SystemExit, match="needed: an archive"):
            render.record_call(document, results)
    # A later call on the same device adds to the first one; one on another device stands alone.
    later = {**FIGURES[2], "peer": "ours, loss and gradient in one go", "forward_backward_ms": 1.125}
    monkeypatch.setattr(render, "datetime", Later)
    for day, gpu in ((1, "NVIDIA X100"), (2, "NVIDIA Y200")):
        Later.day = day
        machine = {**MACHINE, "gpu": gpu, "date": f"2026-01-{day + 2:02}"}
        render.record_call(made_call(modules, monkeypatch, tmp_path / f"day-{day}", [machine, later]), results)
        text = render.results_text(render.newest_calls(results))
        assert "1.125 | 1.00" in text and ("36.000 | 32.00" in text) == (day == 1) and f"one {gpu}" in text
        assert ("2026-01-02 to 2026-01-03" in text) == (day == 1)


class Later(datetime):
    """Calls that begin on other days than they do."""

    day = 0

    @classmethod
    def fromisoformat(cls, text):
        return datetime.fromisoformat(text) + timedelta(days=cls.day)


@pytest.mark.parametrize(("figures", "words", "reason"), [([], (), "on which GPU"), ([MACHINE], ("--tiny",), "tiny shapes")])
def test_calls_that_measured_no_gpu_are_not_recorded(modules, tmp_path, monkeypatch, figures, words, reason):
    on_cpu = {**MACHINE}
    del on_cpu["gpu"]
    packed = made_call(modules, monkeypatch, tmp_path / "one", [on_cpu, *figures], *words)
    with pytest.raises(SystemExit, match=reason):
        modules("render_gpu").record_call(packed, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_documents_match_the_records(modules):
    assert modules("render_gpu").main(["--check"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lossy"], "lossy: no such step; allowed: first, second, "),
        (["second", "--after", "nowhere.json"], "no such file"),
        (["first", "--after", "nowhere.json"], "add second"),
        (["--budget", "0"], "seconds above 0"),
        (["--budget", "nan"], "seconds above 0"),
        (["--output", __file__], "is a file"),
    ],
)
def test_wrong_arguments_are_reported(modules, capsys, words, message):
    with pytest.raises(SystemExit):
        modules("on_gpu").main(words)
    assert message in capsys.readouterr().err


def test_the_second_call_repeats_what_did_not_pass_and_what_that_needs(modules, tmp_path):
    module = modules("on_gpu")
    outcomes = [
        {"name": name, "status": status} for name, status in (("loss", "passed"), ("text", "timed out"), ("of another version", "failed"))
    ]
    after = tmp_path / "steps.json"
    after.write_text(json.dumps(outcomes))
    failed = module.not_passed(after)
    assert failed == ["text"]
    names = [step.name for step in module.schedule("second", failed)]
    assert names == [
        "device",
        "build",
        "text-data",
        "text",
        "documents-tests",
        "documents",
        "experts-tests",
        "experts",
        "optimizer",
        "study",
    ]
    (tmp_path / "call").mkdir()
    (tmp_path / "call" / "steps.json").write_text(json.dumps(outcomes))
    modules("_schedule").pack(tmp_path / "call", tmp_path / "call.tar.gz")
    assert module.not_passed(tmp_path / "call.tar.gz") == ["text"]
    for wrong in ('{"a": 1}', "not json", "[1]"):
        after.write_text(wrong)
        with pytest.raises(SystemExit, match="allowed: the archive of an earlier call"):
            module.not_passed(after)
    runs = tmp_path / "runs"
    assert module.latest_call(runs) != runs / "first" / "steps.json"
    (runs / "first").mkdir(parents=True)
    (runs / "first" / "steps.json").write_text("[]")
    assert module.latest_call(runs) == runs / "first" / "steps.json"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_running_steps_and_the_table_is_printed(tmp_path, number):
    script = (
        "import sys, on_gpu; from _schedule import Step; "
        "on_gpu.FIRST = [Step('sleeps', 'echo begun >$RESULTS/begun; sleep 602', 60), Step('never', 'true', 60, 'exclusive')]; "
        "sys.exit(on_gpu.main(['first']))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}", "OUT": str(tmp_path)}
    command = [sys.executable, "-c", script.replace("'first'", f"'first', '--output', {str(tmp_path / 'runs')!r}")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    begun = tmp_path / "runs" / "first" / "files" / "sleeps" / "begun"
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number
    assert re.search(r"sleeps .* stopped", text) and re.search(r"never .* not reached", text) and f"stopped by {number.name}" in text
    assert not any(path.read_bytes() == b"sleep\x00602\x00" for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    with tarfile.open(tmp_path / "on_gpu-first.tar.gz") as archive:
        assert "first/steps.json" in archive.getnames()


def test_unwritable_results_are_reported_at_the_start(modules, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "below"))
    monkeypatch.chdir(tmp_path)
    assert modules("on_gpu").main(["device", "--output", str(tmp_path / "runs")]) == 2
    assert "cannot write the results" in capsys.readouterr().err
