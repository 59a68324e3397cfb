"""Builds benchmarks/loss_harness.cu in several variants and runs them on a GPU.

    python benchmarks/loss_variants.py [--baseline FOLDER] [--arch sm_90]
        [--only default ...]

A variant sets the number of 16-byte loads that a thread has in flight and the
number of threads in a block. Each variant also times the places where a row
can stay between its two passes. The default variant is first checked against
float64 at full size, the others with short rows. Only nvcc and Python are
needed. Figures go to the file named by FIGURES; the last table compares times
with a copy of the same number of bytes.
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
        name: name in the figures.
        macros: macros of csrc/cuda/multi_token_loss.cu.
        options: command-line options of the harness.
        sources: folder of the kernels.
    """

    name: str
    macros: dict[str, int]
    options: tuple[str, ...]
    sources: Path = SOURCES


def variant(loads: int, threads: int) -> Variant:
    """Returns the variant with these loads in flight and threads in a block."""
    return Variant(f"{loads} loads, {threads} threads", {"MP_LOSS_AHEAD": loads, "MP_LOSS_THREADS": threads}, ("--small", "--brief"))


VARIANTS = [
    Variant("default", {}, ()),
    *(variant(loads, threads) for loads, threads in ((1, 1024), (4, 1024), (2, 512), (4, 512), (8, 256))),
]


def build(each: Variant, folder: Path, arch: str) -> Path | str:
    """Returns the compiled program, or the error message of nvcc."""
    program = folder / each.name.replace(", ", "_").replace(" ", "")
    macros = [f"-D{name}={value}" for name, value in each.macros.items()]
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", *macros, "-I", each.sources, HERE / "loss_harness.cu", "-o", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "nvcc not found"
    return program if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def run(each: Variant, program: Path) -> tuple[int, list[dict[str, Any]]]:
    """Runs a program and prints its lines as they come; returns its exit code and figures."""
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
    """Returns a table of the figures: milliseconds, GB/s, and the share of a copy's GB/s at the same shape."""
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
    """Builds, checks and times the variants; returns 0 if all were correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="folder with other kernels to compare with, such as csrc/cuda of another commit")
    parser.add_argument("--arch", default="sm_90", help="architecture for nvcc (default: sm_90)")
    parser.add_argument("--only", nargs="*", help="names of the variants to build (default: all)")
    parser.add_argument("--check-only", action="store_true", help="check the results without timing")
    args = parser.parse_args()
    variants = [x for x in VARIANTS if not args.only or x.name in args.only]
    if args.check_only:
        variants = [replace(x, options=(*x.options, "--check-only")) for x in variants]
    if args.baseline is not None:
        variants.insert(1, Variant("before", {}, ("--small", "--brief", "--by-size"), args.baseline.resolve()))
    if not has_gpu():
        # One variant is enough to report the missing GPU.
        variants = variants[:1]
    failed, figures = False, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(variants)) as pool:
        # The first variant runs while the others are being built.
        for each, building in [(x, pool.submit(build, x, Path(folder), args.arch)) for x in variants]:
            program = building.result()
            if isinstance(program, str):
                print(f"cannot build {each.name}: {program}", file=sys.stderr, flush=True)
                failed = True
                continue
            code, results = run(each, program)
            figures += results
            if code == 2:
                return 2
            if code != 0:
                print(f"{each.name}: exit code {code}", file=sys.stderr, flush=True)
                failed = True
    print(table(figures), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
