#!/usr/bin/env python
"""What a GPU has to show, as a schedule for a machine that is lent for minutes.

    bash benchmarks/on_gpu.sh first                   build, correctness, kernels, steps of 1.3B, real text: fits 430 s
    bash benchmarks/on_gpu.sh second                  what did not pass in an earlier call, then a study: fits 220 s
    bash benchmarks/on_gpu.sh operators loss          steps by name, and what they need
    bash benchmarks/on_gpu.sh first --tiny            with tiny shapes on the CPU: shows that the schedule runs

Steps run in the order of their value, each under its own time limit, and the next one runs whatever became of it. Work that is timed has
the GPU for itself; tests share it; work of CPUs runs alongside. With less left of --budget than a step needs at least, it is not reached.
After every step the results are packed again: logs, figures (one JSON object a line), profiles, plots. The last lines on the console are a
table of what passed, failed, ran out of time or was not reached. The exit code is 0 where every step passed. Ctrl-C and SIGTERM end what
runs, and the table still comes.

Environment: PYTHON, the interpreter (python3); TEXT, a file of real text (else the source of Python's standard library); BASELINE, a
csrc/cuda of another commit to compare the loss kernels with; PREBUILT, a folder with libraries to use where csrc cannot be built; OUT, the
archive's folder.

`python benchmarks/render_gpu.py ARCHIVE` records the results and writes them into the documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from _schedule import Outcome, Schedule, Step, pack
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
PY = sys.executable
BUDGETS = {"first": 430.0, "second": 220.0}
LOADS = (
    "import sys; from megatron_patch.ops import native; error = native.load_error('cuda'); "
    "print(error or 'the operators load'); sys.exit(error is not None)"
)
SANITIZER = "$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
TEXT = "${TEXT:+--text $TEXT} --output runs/on_gpu_text"
"""Real text by the environment variable TEXT; without it the text is the source of Python's standard library."""
TEXT_RUN = f"{PY} benchmarks/text_run.py {TEXT}"
KERNELS = f"{PY} benchmarks/kernels.py --device cuda"
TINY_KERNELS = f"{PY} benchmarks/kernels.py --tiny --device cpu --jobs 2 --peers ours papers F.emb products"
STEP = f"{PY} benchmarks/step.py --micro-batch-size 8"
SHORT = "--warm-up 1 --steps 1 --no-profile"


def run_test(name: str, *settings: str) -> Step:
    """Whole runs on the GPU that must follow the CPU's, as a step of their own, so that several steps share the GPU.

    Args:
        name: of the step.
        settings: which cases of the test, by what stands between its brackets; none: the test of a resumed run.
    """
    file = "tests/gpu/test_training.py"
    cases = [f"'{file}::test_a_run_on_a_gpu_follows_the_cpu_s[{case}]'" for case in settings] or [
        f"{file}::test_a_resumed_run_repeats_no_step"
    ]
    return Step(f"run-{name}", f"{PY} -m pytest {' '.join(cases)} -m gpu -q -n 0 -o timeout=110", limit=110, needs=("build",))


def sanitizer(tool: str) -> Step:
    """The kernels on small cases under one of compute-sanitizer's tools."""
    program = f"runs/on_gpu_{tool}"
    build = f"mkdir -p runs && nvcc -O3 -lineinfo -std=c++17 -arch=native -I csrc/cuda benchmarks/loss_harness.cu -o {program}"
    return Step(tool, f"{build} && {SANITIZER} --tool {tool} --error-exitcode 1 {program} --check-only --small", limit=90)


DEVICE = Step("device", f"{PY} benchmarks/device_facts.py", limit=40, least=1, tiny=f"{PY} benchmarks/device_facts.py --allow-cpu")
BUILD = Step(
    "build",
    f'MEGATRON_PATCH_CUDA=1 {PY} setup.py -q build_ext --inplace; {PY} -m megatron_patch.ops; {PY} -c "{LOADS}"'
    f' || {{ cp ${{PREBUILT:?}}/*.so megatron_patch/ && {PY} -c "{LOADS}"; }}',
    limit=90,
    gpu="none",
    tiny=f"{PY} -m megatron_patch.ops",
)
FIRST = [
    DEVICE,
    BUILD,
    Step("text-data", f"{TEXT_RUN} --prepare-only", limit=120, gpu="none", needs=("build",)),
    Step("harness", f"{PY} benchmarks/loss_variants.py --arch native ${{BASELINE:+--baseline $BASELINE}}", limit=75, gpu="alone"),
    Step("operators", f"{PY} -m pytest tests/gpu/test_operators.py -m gpu -q -n 0 -o timeout=60", limit=110, needs=("build",)),
    run_test("float32", "--zero-stage 1-0.001", "--zero-stage 3-0.001"),
    run_test("bf16", "--bf16 --zero-stage 1-0.03", "--bf16 --zero-stage 0-0.03"),
    run_test("bf16-zero3", "--bf16 --zero-stage 3-0.03", "--bf16 --zero-stage 1 --recompute-granularity full-0.03"),
    run_test("fp16", "--fp16 --zero-stage 1 --initial-loss-scale 1024-0.03", "--zero-stage 1 --operators plain-0.001"),
    run_test("compiled", "--bf16 --zero-stage 1 --compile-0.03"),
    run_test("resumed"),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    Step("warm", f"FIGURES= {STEP} --variant compiled --stages token --micro-batches 1 {SHORT}", limit=100, needs=("build",)),
    Step(
        "loss",
        f"{KERNELS} --operators loss --budget $((STEP_SECONDS - 5))",
        limit=55,
        gpu="alone",
        needs=("build",),
        tiny=f"{TINY_KERNELS} --operators loss",
    ),
    Step(
        "linear",
        f"{KERNELS} --operators linear --budget $((STEP_SECONDS - 5))",
        limit=55,
        gpu="alone",
        needs=("build",),
        tiny=f"{TINY_KERNELS} --operators linear",
    ),
    Step(
        "compiled",
        f"{STEP} --variant compiled --steps 6 --warm-up 2",
        limit=90,
        gpu="alone",
        needs=("build",),
        least=40,
    ),
    Step(
        "embedding",
        f"{KERNELS} --operators embedding --budget $((STEP_SECONDS - 5))",
        limit=45,
        gpu="alone",
        needs=("build",),
        tiny=f"{TINY_KERNELS} --operators embedding",
    ),
    Step(
        "eager",
        f"{STEP} --variant eager --steps 4 --warm-up 2",
        limit=60,
        gpu="alone",
        needs=("build",),
        least=30,
        tiny=f"{PY} benchmarks/step.py --tiny",
    ),
    Step(
        "text",
        f"{TEXT_RUN} --parallel 2 --seconds $((STEP_SECONDS - 25))",
        limit=100,
        gpu="alone",
        needs=("text-data",),
        least=60,
        tiny=f"{PY} benchmarks/text_run.py --tiny --parallel 2",
    ),
    Step("attention", f"{PY} benchmarks/attention.py", limit=30, gpu="alone", tiny=f"{PY} benchmarks/attention.py --tiny"),
]
SECOND = [
    DEVICE,
    BUILD,
    Step(
        "study",
        f"{PY} benchmarks/study_run.py {TEXT} --parallel 4 --seconds $((STEP_SECONDS - 25))",
        limit=140,
        gpu="alone",
        needs=("build",),
        least=60,
        tiny=f"{PY} benchmarks/study_run.py --tiny --parallel 2",
    ),
]


def schedule(name: str, failed: Sequence[str]) -> list[Step]:
    """The steps of a call.

    Args:
        name: "first" or "second".
        failed: steps of an earlier call that did not pass; the second one repeats them.
    """
    if name == "first":
        return FIRST
    return in_order([*failed, *(step.name for step in SECOND)])


def in_order(names: Sequence[str]) -> list[Step]:
    """Steps by name, with those that they need, in the order of the schedule; the first one says which machine this is."""
    everything = {step.name: step for step in (*FIRST, *SECOND)}
    wanted: set[str] = set()
    left = [DEVICE.name, *names]
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += everything[name].needs
    return [step for name, step in everything.items() if name in wanted]


def not_passed(path: Path) -> list[str]:
    """The steps of an earlier call that did not pass, of those that there are.

    Args:
        path: its steps.json, or its archive.

    Raises:
        SystemExit: it is neither.
    """
    try:
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
        else:
            with tarfile.open(path) as archive:
                member = next(name for name in archive.getnames() if name.endswith("/steps.json"))
                text = cast("IO[bytes]", archive.extractfile(member)).read().decode()
        outcomes = {str(entry["name"]): str(entry["status"]) for entry in json.loads(text)}
    except (OSError, ValueError, KeyError, TypeError, EOFError, StopIteration, tarfile.TarError) as error:
        raise SystemExit(
            f"--after {path}: {error or type(error).__name__}; allowed: an earlier call's archive, or its steps.json"
        ) from None
    known = {step.name for step in (*FIRST, *SECOND)}
    return [name for name, status in outcomes.items() if status != "passed" and name in known]


def latest_call(output: Path) -> Path | None:
    """The steps.json of the last `first` that is known: the one in the results' folder, else a recorded one."""
    recorded = sorted((ROOT / "benchmarks" / "results").glob("gpu-*-first*/steps.json"), key=lambda path: path.parent.name)
    found = [path for path in (output / "first" / "steps.json", *reversed(recorded)) if path.is_file()]
    return found[0] if found else None


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text}; allowed: seconds above 0")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Paths are the caller's; benchmarks/on_gpu.sh goes to the repository's root before this program starts.
    here = Path(os.environ.get("ON_GPU_FROM", os.getcwd()))
    parser.add_argument("what", nargs="*", default=["first"], metavar="STEP", help="first, second, or names of steps (default: first)")
    parser.add_argument(
        "--budget", type=seconds, metavar="SECONDS", help="for everything (default: 430 for first, 220 for second, else no limit)"
    )
    parser.add_argument(
        "--after",
        type=here.joinpath,
        metavar="FILE",
        help="an earlier call's archive or steps.json: `second` repeats what did not pass (default: the last `first` that is known)",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU; steps that only a GPU can run are skipped")
    parser.add_argument(
        "--output", type=here.joinpath, metavar="FOLDER", default=ROOT / "runs" / "on_gpu", help="of the results (default: runs/on_gpu)"
    )
    parser.add_argument("--list", action="store_true", help="prints the steps, their limits and commands, and ends")
    args = parser.parse_args(argv)
    names = {step.name for step in (*FIRST, *SECOND)}
    wrong = [name for name in args.what if name not in BUDGETS and name not in names]
    if wrong:
        parser.error(f"{', '.join(wrong)}: no such step; allowed: first, second, {', '.join(sorted(names))}")
    if args.after is not None and "second" not in args.what:
        parser.error("--after says what `second` repeats; name second")
    if args.after is not None and not args.after.is_file():
        parser.error(f"--after {args.after}: there is no such file; allowed: an earlier call's archive, or its steps.json")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output}: this is a file; allowed: a folder")
    return args


def chosen_steps(args: argparse.Namespace, console: Console) -> tuple[str, list[Step]]:
    """The call's name, and its steps."""
    failed: list[str] = []
    if "second" in args.what:
        after = args.after or latest_call(args.output)
        failed = [] if after is None else not_passed(after)
        what = (
            f"after {after}: {', '.join(failed) or 'everything passed'}" if after else "no earlier call is known, so that none is repeated"
        )
        console.print(f"second, {what}", soft_wrap=True)
    if len(args.what) == 1 and args.what[0] in BUDGETS:
        return args.what[0], schedule(args.what[0], failed)
    wanted: list[str] = []
    for name in args.what:
        wanted += [step.name for step in schedule(name, failed)] if name in BUDGETS else [name]
    # Calls of single steps keep their results side by side.
    return f"steps-{time.strftime('%H%M%S')}", in_order(wanted)


def tiny_steps(steps: list[Step]) -> tuple[list[Step], dict[str, Outcome]]:
    """The steps with their tiny commands; those without one are skipped."""
    kept = [dataclasses.replace(step, command=step.tiny, limit=4 * step.limit) for step in steps if step.tiny is not None]
    return kept, {step.name: Outcome(step.name, "skipped", last_lines=["needs a GPU"]) for step in steps if step.tiny is None}


def main(argv: list[str] | None = None) -> int:
    """Runs the call; returns the exit code."""
    args = parse(argv)
    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if terminal else 120, highlight=False)
    name, everything = chosen_steps(args, console)
    steps, skipped = tiny_steps(everything) if args.tiny else (everything, {})
    if args.list:
        for step in steps:
            console.print(f"{step.name:14} {step.limit:4.0f} s  GPU {step.gpu:6}  {step.command}", markup=False, soft_wrap=True)
        return 0
    os.chdir(ROOT)
    # The caches stay with the call: a step that warms them serves those after it.
    cache = args.output.resolve().parent / "on_gpu_cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    budget = args.budget or (BUDGETS[name] if name in BUDGETS and not args.tiny else math.inf)
    # Seconds that the shell took before, installing wheels, belong to the budget.
    before = max(0.0, time.time() - float(os.environ.get("ON_GPU_BEGAN", time.time())))
    packed = Path(os.environ.get("OUT") or args.output.parent) / f"on_gpu-{name}.tar.gz"
    try:
        run = Schedule(steps, args.output / name, budget, packed, console, time.monotonic() - before)
        call = {"name": name, "tiny": args.tiny, "began": datetime.now().isoformat(timespec="seconds"), "budget": args.budget}
        (run.folder / "call.json").write_text(json.dumps(call) + "\n", encoding="utf-8")
        packed.parent.mkdir(parents=True, exist_ok=True)
        pack(run.folder, packed)
    except OSError as error:
        print(f"the results cannot be written: {error}; OUT and --output name their folders", file=sys.stderr)
        return 2
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        run.stop(number)

    kept = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.run()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    run.outcomes |= skipped
    run.steps = everything
    run.pack()
    run.print_table()
    console.print(f"results: {packed}", soft_wrap=True)
    if received:
        return 128 + received[0]
    allowed = ("passed", "skipped") if args.tiny else ("passed",)
    return 0 if all(outcome.status in allowed for outcome in run.outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
