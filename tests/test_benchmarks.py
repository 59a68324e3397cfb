"""Every documented command of a benchmark is accepted by its program, and a peer that fails affects only its own rows."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "benchmarks").glob("*.*")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
PROGRAMS = "documents|experts|integrations|kernels|layouts|training"
"""Programs with flags."""


def commands() -> list[str]:
    """Commands on lines of docstrings, between backticks in documents, and in the steps of the GPU schedule."""
    found = set()
    for path in SOURCES:
        if path.suffix in (".py", ".sh", ".md"):
            pattern = rf"(?:^ +python|`python) (benchmarks/(?:{PROGRAMS})\.py[^`\n]*)"
            found |= {re.split(r"\s{2,}", line)[0].strip() for line in re.findall(pattern, path.read_text(), re.MULTILINE)}
    return sorted(found | scheduled())


def scheduled() -> set[str]:
    """Commands of these programs in the GPU schedule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        steps = importlib.import_module("on_gpu")
    every = [command for step in (*steps.FIRST, *steps.SECOND) for command in (step.command, step.tiny) if command]
    every = [re.sub(r"\$\(\(STEP_SECONDS[^)]*\)\)", "40", command) for command in every]
    return {line for command in every for line in re.findall(rf"benchmarks/(?:{PROGRAMS})\.py[^;|&]*", command)}


def test_commands_are_found():
    assert len(commands()) > 5 and any("--budget" in line for line in scheduled())


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_is_accepted(line, monkeypatch, capsys):
    script, *words = shlex.split(line)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(Path(script).stem)
    # Help is printed after all flags before it have been parsed.
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0, capsys.readouterr().err


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


PEERS = """
    import os, signal, time
    import torch

    def good(logits, labels):
        wide = logits.float()
        return (torch.logsumexp(wide, -1)[:, None] - wide.gather(1, labels)).mean()

    def raises(logits, labels):
        raise RuntimeError("no such shape")

    def dies(logits, labels):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs(logits, labels):
        with open("hanging", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)
"""


def start(tmp_path, *words):
    """kernels.py on a few rows of the loss, ours and those of PEERS that are named."""
    (tmp_path / "some_peers.py").write_text(textwrap.dedent(PEERS))
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--tiny", "--device", "cpu", "--operators", "loss"]
    environment = {**os.environ, "FIGURES": str(tmp_path / "figures.jsonl"), "RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--rows", "6", "--patch-sizes", "4", "--peers", "ours", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(tmp_path, kind):
    path = tmp_path / "figures.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] == kind]


def test_a_peer_that_raises_dies_or_hangs_affects_only_its_own_rows(tmp_path):
    names = ["hangs", "dies", "raises", "good"]
    given = [f"{name}=some_peers:{name}" for name in names]
    process = start(tmp_path, "--jobs", "4", "--peer-seconds", "5", "--peer", *given)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    figures = lines(tmp_path, "kernel")
    assert [line["peer"] for line in figures][-1] == "good" and len(figures) == 4, printed
    assert all(0 < line["forward_backward_ms"] < 1e4 and line["error"] < 1e-6 for line in figures)
    failed = {line["peer"]: line["error"] for line in lines(tmp_path, "kernel_failed")}
    assert set(failed) == set(names[:-1])
    assert failed["raises"] == "RuntimeError: no such shape" and "SIGSEGV" in failed["dies"]
    assert failed["hangs"] == "killed: its use of the device took more than 5 s"
    assert all(name in printed.split("failed, skipped")[1] for name in failed)
    assert [line["when"] for line in lines(tmp_path, "ceiling")] == ["before"] * 3 + ["after"] * 3
    (results,) = (tmp_path / "results").glob("*.json")
    assert [row["peer"] for row in json.loads(results.read_text())["rows"]] == [line["peer"] for line in figures]


def test_a_killed_parent_leaves_its_figures_and_no_child(tmp_path):
    process = start(tmp_path, "--jobs", "3", "--peer", "hangs=some_peers:hangs")
    deadline = time.monotonic() + 200
    while not (tmp_path / "hanging").exists() or not (tmp_path / "hanging").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "hanging").read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(lines(tmp_path, "kernel")) == 3
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_our_own_failure_fails_the_run(tmp_path):
    # No machine has the memory.
    process = start(tmp_path, "--vocab", str(10**14))
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and printed.endswith("\none of our operators failed\n"), printed
    assert any(line["peer"].startswith("ours") for line in lines(tmp_path, "kernel_failed"))


def test_peers_beyond_the_budget_are_not_reached(tmp_path):
    process = start(tmp_path, "--budget", "0.2")
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and printed.endswith("\none of our operators was not reached in time\n"), printed


def test_the_last_line_names_the_reason_of_the_failure(module, tmp_path):
    kernels, access = module("kernels"), module("_device_access")
    peers = module("_peers")
    jobs = {"ours": ("loss", peers.Peer("ours", list, ours=True)), "theirs": ("loss", peers.Peer("theirs", list))}

    def wrong(*failures, **figure):
        collector = kernels.Collector(None, jobs, tmp_path)
        for name, reason in failures:
            collector.failed(access.Job(name, ()), {"kind": "kernel_failed", "peer": name, "error": reason})
        if figure:
            collector.on_message(access.Job("theirs", ()), {"figure": {"kind": "kernel_failed", "peer": "theirs", "error": "x", **figure}})
        return collector.failure_reason()

    late, failure = f"{access.NOT_REACHED} the budget of 3 s", "RuntimeError: no"
    assert wrong() is None and wrong(("theirs", failure), ("ceilings", late)) is None
    assert wrong(("ours", late)) == "one of our operators was not reached in time"
    assert wrong(("ours", failure), ("ours", late)).startswith("one of our operators failed; ")
    assert wrong(not_finite=["error"]) == "a figure is not finite"


@pytest.mark.parametrize(
    "words, error",
    [
        ("--peers ours nobody", "--peers nobody: no such peer (allowed: words from ours; "),
        ("--operators embedding --peers quack", "--peers quack: no such peer (allowed: words from ours; "),
        ("--jobs 0", "--jobs: '0' (allowed: whole numbers from 1)"),
        ("--rounds -1", "--rounds: '-1' (allowed: whole numbers from 1)"),
        ("--budget 0", "--budget: '0' (allowed: numbers above 0)"),
        ("--budget=-3", "--budget: '-3' (allowed: numbers above 0)"),
        ("--budget nan", "--budget: 'nan' (allowed: numbers above 0)"),
        ("--peer-seconds 0", "--peer-seconds: '0' (allowed: numbers above 0)"),
        ("--device cuda", "no GPU found; give --device cpu"),
    ],
)
def test_a_command_that_cannot_be_measured_is_refused_at_once(words, error, module, monkeypatch, capsys):
    kernels = module("kernels")
    monkeypatch.setattr(kernels, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *words.split()])
    with pytest.raises(SystemExit) as end:
        kernels.parse()
    assert end.value.code == 2 and error in capsys.readouterr().err


def test_a_signal_waits_until_torch_has_been_imported(module, monkeypatch, capsys):
    kernels = module("kernels")
    monkeypatch.setattr(kernels.signal, "signal", lambda *_: None)
    handler = kernels.SignalHandler()

    def imported(name):
        handler._on_signal(signal.SIGTERM, None)
        print("imported")

    monkeypatch.setattr(kernels.importlib, "import_module", imported)
    with pytest.raises(SystemExit) as end:
        handler.import_torch()
    printed = capsys.readouterr()
    assert end.value.code == 143 and printed.out == "imported\n" and "ended by SIGTERM" in printed.err
    with pytest.raises(SystemExit) as end:
        kernels.SignalHandler()._on_signal(signal.SIGINT, None)
    assert end.value.code == 130


CHILD = """
    import json, sys, time
    from pathlib import Path
    from _device_access import DeviceAccess

    name, log, plan = sys.argv[1], sys.argv[2], sys.argv[3].split()
    access = DeviceAccess(int(sys.argv[4]), int(sys.argv[5]))
    for how in plan:
        if how in ("shared", "exclusive", "last"):
            grant = access.acquire(how)
            with open(log, "a") as file:
                file.write(name + " " + how + chr(10))
        elif how == "meet":
            # Continues when another child has access at the same time.
            Path(f"{log}-{name}").touch()
            while len(list(Path(log).parent.glob("grants-*"))) < 2:
                time.sleep(0.01)
        elif how == "sleep":
            time.sleep(1000)
        elif how == "leave":
            print("its last line")
            sys.exit(0)
        elif how == "report":
            access.send(grant=grant)
    access.send(done=True)
"""


def run_children(tmp_path, module, plans, urgent=(), limit=60.0, budget=None):
    """Runs children with these plans; returns their accesses in order, how each ended, and their messages."""
    access = module("_device_access")
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    log = tmp_path / "grants"
    jobs = [access.Job(name, (sys.executable, str(script), name, str(log), plan), name in urgent) for name, plan in plans.items()]
    ends, messages = {}, {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    access.run(
        jobs,
        tmp_path,
        environment,
        at_once=4,
        limit=limit,
        budget=budget,
        on_message=lambda job, message: messages.setdefault(job.name, message),
        on_end=lambda job, reason: ends.setdefault(job.name, reason),
        grant={"limits": 3},
        began=time.monotonic(),
    )
    return log.read_text().split("\n")[:-1] if log.exists() else [], ends, messages


def test_urgent_access_comes_first_shared_access_together_and_the_last_one_last(tmp_path, module):
    plans = {
        "first": "exclusive report last",
        "ours": "exclusive",
        "a": "shared meet exclusive",
        "b": "shared meet exclusive",
        "c": "exclusive",
    }
    grants, ends, messages = run_children(tmp_path, module, plans, urgent=("first", "ours"))
    assert grants[:2] == ["first exclusive", "ours exclusive"] and grants[-1] == "first last"
    assert sorted(grants[2:-1]) == ["a exclusive", "a shared", "b exclusive", "b shared", "c exclusive"]
    assert ends == dict.fromkeys(plans) and messages == {"first": {"grant": {"limits": 3}}}


def test_the_limit_ends_a_long_access_and_the_budget_ends_all_but_the_last_one(tmp_path, module):
    plans = {"hangs": "exclusive sleep", "leaves": "exclusive leave", "next": "exclusive"}
    grants, ends, _ = run_children(tmp_path, module, plans, urgent=tuple(plans), limit=2.0)
    early = "ended early with exit code 0: its last line"
    assert ends == {"hangs": "killed: its use of the device took more than 2 s", "leaves": early, "next": None}
    assert grants == ["hangs exclusive", "leaves exclusive", "next exclusive"]
    plans = {
        "first": "exclusive last",
        "hangs": "exclusive sleep",
        "waits": "exclusive",
        **{f"more-{number}": "exclusive" for number in range(3)},
    }
    _, ends, _ = run_children(tmp_path, module, plans, urgent=("first", "hangs"), budget=4.0)
    assert ends["first"] is None and ends["hangs"] == "stopped at the end of the budget of 4 s"
    assert {ends[name] for name in plans if name not in ("first", "hangs")} == {"not reached in the budget of 4 s"}


def test_an_error_is_measured_against_the_exact_gradient(module):
    operators, peers = module("_operators"), module("_peers")
    size = {"rows": 5, "vocab": 30, "hidden": 8, "patch_size": 3}
    for operator, right in {
        "loss": peers.patch_train_loss,
        "embedding": lambda w, ids: w[ids].mean(dim=-2),
        "linear": lambda h, w, y: peers.patch_train_loss(h @ w.t(), y),
    }.items():
        case = operators.CASES[operator](size, torch.float32, torch.device("cpu"))
        assert case.error(peers.Variant("right", right)) < 1e-6
        wrong = peers.Variant("wrong", lambda *inputs, right=right: 1.25 * right(*inputs))
        assert case.error(wrong) == pytest.approx(0.25, rel=1e-4)
        assert torch.tensor(case.error(peers.Variant("nan", lambda *inputs, right=right: right(*inputs) * float("nan")))).isnan()


def test_a_timer_stops_at_its_seconds_but_not_before_the_fewest_rounds(module):
    calls = []
    timer = module("_measure").Timer(torch.device("cpu"), rounds=1000, seconds=0.0, fewest=4)
    assert timer.medians({"work": lambda: calls.append(1)})["work"] >= 0
    # Two more warm up.
    assert len(calls) == 2 + 4


def test_attention_inside_documents_is_measured_next_to_the_dense_mask(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FIGURES", str(tmp_path / "figures.jsonl"))
    documents = module("documents")
    assert documents.main(["--tiny", "--mixes", "128 each", "short texts"]) == 0
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [(figure["mix"], figure["peer"]) for figure in figures] == [
        (mix, peer) for mix in ("128 each", "short texts") for peer in ("plain causal", "dense mask", "ours")
    ]
    assert all(figure["forward_backward_ms"] > 0 and figure["peak_mb"] > 0 for figure in figures)
    assert figures[0]["documents"] == 2 and figures[0]["longest"] == 128 and figures[3]["documents"] > 4
    assert figures[0]["speed_of_plain"] == 1 and figures[2]["error"] < 1e-6
    assert documents.main(["--tiny", "--window", "100", "--mixes", "128 each", "one"]) == 0
    windowed = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()][len(figures) :]
    assert [figure["documents"] for figure in windowed] == [2] * 3 + [1] * 3 and windowed[5]["error"] < 1e-6
    monkeypatch.setattr(
        documents, "documents_attention", lambda queries, keys, values, documents, window=None: queries + keys.mean() + values.mean()
    )
    assert documents.main(["--tiny", "--window", "64"]) == 1, "also with a window"
    assert documents.main(["--tiny"]) == 1 and "differs from the dense mask" in capsys.readouterr().err, "wrong numbers are no result"
    with pytest.raises(SystemExit):
        documents.parse(["--heads", "6", "--groups", "4"])
    assert "--groups 4 (allowed: a divisor of --heads, 6)" in capsys.readouterr().err
