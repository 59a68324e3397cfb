"""Builds benchmarks/loss_harness.cu in several variants, side by side, and runs them on the GPU one after another.

    python benchmarks/loss_variants.py [--baseline FOLDER] [--arch sm_90] [--only default ...]

A variant is a number of 16-byte loads that a thread has in flight and a number of threads in a block; each of them also times where a row
may stay between its two passes. The variant that serves is checked against float64 first, at full size; the others on short rows. FOLDER
holds older kernels (a csrc/cuda of another commit) to compare with. Nothing but nvcc and Python is needed. Figures go to the file that
FIGURES names; the last table compares milliseconds with a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _device import has_gpu

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "cuda"
SECONDS = 60


@dataclass(frozen=True)
class Variant:
    """A way to build the harness.

    Attributes:
        name: what its figures are called.
        macros: of csrc/cuda/multi_token_loss.cu.
        options: of the harness.
        sources: where the kernels are.
    """

    name: str
    macros: dict[str, int]
    options: tuple[str, ...]
    sources: Path = SOURCES


def variant(loads: int, threads: int) -> Variant:
    """Loads in flight and threads of a block."""
    return Variant(f"{loads} loads, {threads} threads", {"MP_LOSS_AHEAD": loads, "MP_LOSS_THREADS": threads}, ("--small", "--brief"))


VARIANTS = [
    Variant("default", {}, ()),
    *(variant(loads, threads) for loads, threads in ((1, 1024), (4, 1024), (2, 512), (4, 512), (8, 256))),
]


def build(each: Variant, folder: Path, arch: str) -> Path | str:
    """The program, or what nvcc said."""
    program = folder / each.name.replace(", ", "_").replace(" ", "")
    macros = [f"-D{name}={value}" for name, value in each.macros.items()]
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", *macros, "-I", each.sources, HERE / "loss_harness.cu", "-o", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no nvcc"
    return program if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def run(each: Variant, program: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and figures; its lines are printed as they come."""
    figures = []
    command = ["timeout", "-k", "5", str(SECONDS), str(program), "--variant", each.name, *each.options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                figures.append(json.loads(line))
            else:
                print(line, end="", flush=True)
    return process.returncode, figures


def table(figures: list[dict[str, Any]]) -> str:
    """A line for each figure: milliseconds, GB/s, share of the copy's GB/s at the same shape."""
    copies: dict[tuple[Any, Any], float] = {}
    for x in figures:
        if x["operator"] == "copy" and x["gb_per_second"]:
            key = (x["vocab"], x["dtype"])
            copies[key] = max(copies.get(key, 0.0), x["gb_per_second"])
    lines = [f"{'variant':34} {'operator':26} {'vocab':>7} {'K':>2} {'dtype':>9} {'ms':>8} {'GB/s':>7} {'of copy':>8}"]
    for x in sorted(figures, key=lambda x: (x["dtype"], x["vocab"], x["patch_size"], x["operator"], x["ms"] or 1e9)):
        head = f"{x['variant']:34} {x['operator']:26} {x['vocab']:7} {x['patch_size']:2} {x['dtype']:>9}"
        if x["error"]:
            lines.append(f"{head} {x['error']}")
            continue
        copy = copies.get((x["vocab"], x["dtype"])) or copies.get((x["vocab"], "bfloat16"))
        share = f"{x['gb_per_second'] / copy:8.1%}" if copy else ""
        lines.append(f"{head} {x['ms']:8.4f} {x['gb_per_second']:7.0f} {share}")
    return "\n".join(lines)


def main() -> int:
    """Builds, checks, times, compares; 0 if every variant was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="a folder of older kernels to compare with")
    parser.add_argument("--arch", default="sm_90", help="what nvcc builds for")
    parser.add_argument("--only", nargs="*", help="names of the variants to build")
    parser.add_argument("--check-only", action="store_true", help="no times")
    args = parser.parse_args()
    variants = [x for x in VARIANTS if not args.only or x.name in args.only]
    if args.check_only:
        variants = [replace(x, options=(*x.options, "--check-only")) for x in variants]
    if args.baseline is not None:
        variants.insert(1, Variant("before", {}, ("--small", "--brief", "--by-size"), args.baseline.resolve()))
    if not has_gpu():
        # One is enough to say so.
        variants = variants[:1]
    failed, figures = False, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(variants)) as pool:
        # The first runs while the others are still being built.
        for each, building in [(x, pool.submit(build, x, Path(folder), args.arch)) for x in variants]:
            program = building.result()
            if isinstance(program, str):
                print(f"{each.name} was not built: {program}", file=sys.stderr, flush=True)
                failed = True
                continue
            code, found = run(each, program)
            figures += found
            if code == 2:
                return 2
            if code != 0:
                print(f"{each.name}: exit code {code}", file=sys.stderr, flush=True)
                failed = True
    print(table(figures), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
