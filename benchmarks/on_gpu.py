#!/usr/bin/env python
"""Runs all tests and benchmarks that need a GPU, within minutes.

    bash benchmarks/on_gpu.sh first             build, correctness, kernels, steps
                                                of 1.3B, real text: within 430 s
    bash benchmarks/on_gpu.sh second            steps that did not pass in an earlier
                                                call, then a study: within 220 s
    bash benchmarks/on_gpu.sh operators loss    these steps and those that they need
    bash benchmarks/on_gpu.sh first --tiny      tiny shapes on the CPU, to test the
                                                schedule

The most valuable steps run first, each with its own time limit; a step that
fails does not stop the next one. Measurements have exclusive use of the GPU,
tests share it, and work on CPUs runs at the same time. A step is not reached if
less of --budget is left than it needs. After every step the results are packed
again: logs, figures (one JSON object per line), profiles, plots. The last lines
of the output are a table of all steps. The exit code is 0 if every step passed.
Ctrl-C and SIGTERM end the running steps; the table is printed even then.

Environment variables:
  PYTHON    the interpreter (default: python3)
  TEXT      a file of real text (default: the source of Python's library)
  BASELINE  csrc/cuda of another commit, to compare the loss kernels with
  PREBUILT  a folder with libraries, used if csrc cannot be built
  OUT       the folder of the archive

python benchmarks/render_gpu.py ARCHIVE records the results and writes them into
the documents.
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
from typing import IO, Any, cast

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
"""Flags for the text named by the environment variable TEXT, or for the source of Python's standard library."""
TEXT_RUN = f"{PY} benchmarks/text_run.py {TEXT}"
KERNELS = f"{PY} benchmarks/kernels.py --device cuda"
TINY_KERNELS = f"{PY} benchmarks/kernels.py --tiny --device cpu --jobs 2 --peers ours papers F.emb products"
STEP = f"{PY} benchmarks/step.py --micro-batch-size 8"
SHORT = "--warm-up 1 --steps 1 --no-profile"


def after_build(name: str, command: str, limit: float, **options: Any) -> Step:
    """Returns a step that starts after the operators have been built, with the further fields of `Step` in `options`."""
    return Step(name, command, limit, needs=("build",), **options)


def run_test(name: str, *settings: str) -> Step:
    """Returns a step with runs on the GPU that must match runs on the CPU; several such steps share the GPU.

    Args:
        name: name of the step.
        settings: cases of the test, as in the brackets of its ids; none selects the test of a resumed run.
    """
    file = "tests/gpu/test_training.py"
    cases = [f"'{file}::test_a_run_on_a_gpu_follows_the_cpu_s[{case}]'" for case in settings] or [
        f"{file}::test_a_resumed_run_repeats_no_step"
    ]
    return after_build(f"run-{name}", f"{PY} -m pytest {' '.join(cases)} -m gpu -q -n 0 -o timeout=110", limit=110)


def sanitizer(tool: str) -> Step:
    """Returns a step that runs small cases of the kernels under a tool of compute-sanitizer."""
    program = f"runs/on_gpu_{tool}"
    build = f"mkdir -p runs && nvcc -O3 -lineinfo -std=c++17 -arch=native -I csrc/cuda benchmarks/loss_harness.cu -o {program}"
    return Step(tool, f"{build} && {SANITIZER} --tool {tool} --error-exitcode 1 {program} --check-only --small", limit=90)


MUON_TESTS = " ".join(
    f"'tests/gpu/test_training.py::{name}'"
    for name in (
        "test_muon_on_a_gpu_follows_muon_on_the_cpu[--zero-stage 1-False-0.001]",
        "test_muon_on_a_gpu_follows_muon_on_the_cpu[--bf16 --zero-stage 3-False-0.03]",
        "test_muon_on_a_gpu_follows_muon_on_the_cpu[--bf16 --zero-stage 1-True-0.03]",
        "test_orthogonalization_in_float32_does_not_use_tf32",
    )
)
"""The Muon tests of the first call; the other cases follow in a run of the whole file."""
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
    after_build("text-data", f"{TEXT_RUN} --prepare-only", limit=120, gpu="none"),
    Step("harness", f"{PY} benchmarks/loss_variants.py --arch native ${{BASELINE:+--baseline $BASELINE}}", limit=75, gpu="exclusive"),
    after_build("operators", f"{PY} -m pytest tests/gpu/test_operators.py -m gpu -q -n 0 -o timeout=60", limit=110),
    run_test("float32", "--zero-stage 1-0.001", "--zero-stage 3-0.001"),
    run_test("bf16", "--bf16 --zero-stage 1-0.03", "--bf16 --zero-stage 0-0.03"),
    run_test("bf16-zero3", "--bf16 --zero-stage 3-0.03", "--bf16 --zero-stage 1 --recompute-granularity full-0.03"),
    run_test("fp16", "--fp16 --zero-stage 1 --initial-loss-scale 1024-0.03", "--zero-stage 1 --operators plain-0.001"),
    run_test("compiled", "--bf16 --zero-stage 1 --compile-0.03"),
    run_test("resumed"),
    after_build("run-muon", f"{PY} -m pytest {MUON_TESTS} -m gpu -q -n 0 -o timeout=110", limit=110),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    after_build("warm", f"FIGURES= {STEP} --variant compiled --stages token --micro-batches 1 {SHORT}", limit=100),
    after_build(
        "loss",
        f"{KERNELS} --operators loss --budget $((STEP_SECONDS - 5))",
        limit=55,
        gpu="exclusive",
        tiny=f"{TINY_KERNELS} --operators loss",
    ),
    after_build(
        "linear",
        f"{KERNELS} --operators linear --budget $((STEP_SECONDS - 5))",
        limit=55,
        gpu="exclusive",
        tiny=f"{TINY_KERNELS} --operators linear",
    ),
    after_build(
        "compiled",
        f"{STEP} --variant compiled --steps 6 --warm-up 2",
        limit=90,
        gpu="exclusive",
        least=40,
    ),
    after_build(
        "embedding",
        f"{KERNELS} --operators embedding --budget $((STEP_SECONDS - 5))",
        limit=45,
        gpu="exclusive",
        tiny=f"{TINY_KERNELS} --operators embedding",
    ),
    after_build(
        "eager",
        f"{STEP} --variant eager --steps 4 --warm-up 2",
        limit=60,
        gpu="exclusive",
        least=30,
        tiny=f"{PY} benchmarks/step.py --tiny",
    ),
    Step(
        "text",
        f"{TEXT_RUN} --parallel 2 --seconds $((STEP_SECONDS - 25))",
        limit=100,
        gpu="exclusive",
        needs=("text-data",),
        least=60,
        tiny=f"{PY} benchmarks/text_run.py --tiny --parallel 2",
    ),
    Step("attention", f"{PY} benchmarks/attention.py", limit=30, gpu="exclusive", tiny=f"{PY} benchmarks/attention.py --tiny"),
]
SECOND = [
    DEVICE,
    BUILD,
    after_build("documents-tests", f"{PY} -m pytest tests/gpu/test_documents_attention.py -m gpu -q -n 0 -o timeout=60", limit=60),
    Step("documents", f"{PY} benchmarks/documents.py", limit=30, gpu="exclusive", tiny=f"{PY} benchmarks/documents.py --tiny"),
    after_build("experts-tests", f"{PY} -m pytest tests/gpu/test_experts.py -m gpu -q -n 0 -o timeout=40", limit=45),
    Step("experts", f"{PY} benchmarks/experts.py", limit=20, gpu="exclusive", tiny=f"{PY} benchmarks/experts.py --tiny"),
    after_build("optimizer", f"{PY} benchmarks/optimizer.py", limit=25, gpu="exclusive", tiny=f"{PY} benchmarks/optimizer.py --tiny"),
    after_build(
        "study",
        f"{PY} benchmarks/study_run.py {TEXT} --parallel 4 --seconds $((STEP_SECONDS - 25))",
        limit=140,
        gpu="exclusive",
        least=60,
        tiny=f"{PY} benchmarks/study_run.py --tiny --parallel 2",
    ),
]


def schedule(name: str, failed: Sequence[str]) -> list[Step]:
    """Returns the steps of a call.

    Args:
        name: "first" or "second".
        failed: steps of an earlier call that did not pass, which "second" repeats.
    """
    if name == "first":
        return FIRST
    return in_order([*failed, *(step.name for step in SECOND)])


def in_order(names: Sequence[str]) -> list[Step]:
    """Returns the named steps and those that they need, in the order of the schedule; the first one records the machine."""
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
    """Returns the steps of an earlier call that did not pass and still exist.

    Args:
        path: steps.json or archive of the call.

    Raises:
        SystemExit: the file is neither.
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
            f"--after {path}: {error or type(error).__name__}; allowed: the archive of an earlier call, or its steps.json"
        ) from None
    known = {step.name for step in (*FIRST, *SECOND)}
    return [name for name, status in outcomes.items() if status != "passed" and name in known]


def latest_call(output: Path) -> Path | None:
    """Returns the steps.json of the last known call of `first`: that in the results folder, else a recorded one; None without any."""
    recorded = sorted((ROOT / "benchmarks" / "results").glob("gpu-*-first*/steps.json"), key=lambda path: path.parent.name)
    candidates = [path for path in (output / "first" / "steps.json", *reversed(recorded)) if path.is_file()]
    return candidates[0] if candidates else None


def seconds(text: str) -> float:
    """Reads a number of seconds above 0, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text}; allowed: seconds above 0")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Paths are relative to the caller's folder, which benchmarks/on_gpu.sh leaves before it starts this program.
    here = Path(os.environ.get("ON_GPU_FROM", os.getcwd()))
    parser.add_argument("what", nargs="*", default=["first"], metavar="STEP", help="first, second, or names of steps (default: first)")
    parser.add_argument(
        "--budget", type=seconds, metavar="SECONDS", help="time limit for all steps (default: 430 for first, 220 for second, else none)"
    )
    parser.add_argument(
        "--after",
        type=here.joinpath,
        metavar="FILE",
        help="archive or steps.json of an earlier call, whose steps that did not pass `second` repeats (default: the last known `first`)",
    )
    parser.add_argument("--tiny", action="store_true", help="use tiny shapes on the CPU; skip steps that need a GPU")
    parser.add_argument(
        "--output",
        type=here.joinpath,
        metavar="FOLDER",
        default=ROOT / "runs" / "on_gpu",
        help="folder for the results (default: runs/on_gpu)",
    )
    parser.add_argument("--list", action="store_true", help="print the steps, their limits and commands, and stop")
    args = parser.parse_args(argv)
    names = {step.name for step in (*FIRST, *SECOND)}
    wrong = [name for name in args.what if name not in BUDGETS and name not in names]
    if wrong:
        parser.error(f"{', '.join(wrong)}: no such step; allowed: first, second, {', '.join(sorted(names))}")
    if args.after is not None and "second" not in args.what:
        parser.error("--after needs `second`, whose steps it selects; add second")
    if args.after is not None and not args.after.is_file():
        parser.error(f"--after {args.after}: no such file; allowed: the archive of an earlier call, or its steps.json")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; allowed: a folder")
    return args


def chosen_steps(args: argparse.Namespace, console: Console) -> tuple[str, list[Step]]:
    """Returns the name of the call and its steps."""
    failed: list[str] = []
    if "second" in args.what:
        after = args.after or latest_call(args.output)
        failed = [] if after is None else not_passed(after)
        what = (
            f"after {after}: repeats {', '.join(failed) or 'nothing, everything passed'}"
            if after
            else "no earlier call found, nothing to repeat"
        )
        console.print(f"second, {what}", soft_wrap=True)
    if len(args.what) == 1 and args.what[0] in BUDGETS:
        return args.what[0], schedule(args.what[0], failed)
    wanted: list[str] = []
    for name in args.what:
        wanted += [step.name for step in schedule(name, failed)] if name in BUDGETS else [name]
    # Each call of single steps keeps its own results.
    return f"steps-{time.strftime('%H%M%S')}", in_order(wanted)


def tiny_steps(steps: list[Step]) -> tuple[list[Step], dict[str, Outcome]]:
    """Returns the steps with their tiny commands, and the results of steps that have none and are skipped."""
    kept = [dataclasses.replace(step, command=step.tiny, limit=4 * step.limit) for step in steps if step.tiny is not None]
    return kept, {step.name: Outcome(step.name, "skipped", last_lines=["needs a GPU"]) for step in steps if step.tiny is None}


def main(argv: list[str] | None = None) -> int:
    """Runs the call and returns the exit code."""
    args = parse(argv)
    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if terminal else 120, highlight=False, markup=False)
    name, everything = chosen_steps(args, console)
    steps, skipped = tiny_steps(everything) if args.tiny else (everything, {})
    if args.list:
        for step in steps:
            console.print(f"{step.name:14} {step.limit:4.0f} s  GPU {step.gpu:6}  {step.command}", markup=False, soft_wrap=True)
        return 0
    os.chdir(ROOT)
    # Later steps reuse the caches that the step `warm` fills.
    cache = args.output.resolve().parent / "on_gpu_cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    budget = args.budget or (BUDGETS[name] if name in BUDGETS and not args.tiny else math.inf)
    # The budget includes the time in which the shell installed wheels.
    before = max(0.0, time.time() - float(os.environ.get("ON_GPU_BEGAN", time.time())))
    packed = Path(os.environ.get("OUT") or args.output.parent) / f"on_gpu-{name}.tar.gz"
    try:
        run = Schedule(steps, args.output / name, budget, packed, console, time.monotonic() - before)
        call = {"name": name, "tiny": args.tiny, "began": datetime.now().isoformat(timespec="seconds"), "budget": args.budget}
        (run.folder / "call.json").write_text(json.dumps(call) + "\n", encoding="utf-8")
        packed.parent.mkdir(parents=True, exist_ok=True)
        pack(run.folder, packed)
    except OSError as error:
        print(f"cannot write the results: {error}; change OUT or --output, which name their folders", file=sys.stderr)
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
