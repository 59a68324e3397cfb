#!/usr/bin/env python
"""The fused operators and their peers: time, traffic, share of the machine's ceiling, peak memory, error against float64.

    python benchmarks/kernels.py                        on this machine, GPU or CPU, at the sizes that docs/performance.md quotes
    python benchmarks/kernels.py --operators loss --rows 2048 --vocab 32000 --patch-sizes 1 4
    python benchmarks/kernels.py --device cuda --operators linear --budget 35 --peer-seconds 20
    python benchmarks/kernels.py --tiny --device cpu    a few rows of everything, in seconds: what a rehearsal needs

Peers: the formula as the papers' code writes it, our plain formula, torch.compile of the shortest formula, torch's own fused modules, and
Liger, Megatron core, cut-cross-entropy and quack where they are installed (they take one label a row); `--peer NAME=module:function` adds
one. Each runs in a process of its own, which handles all of its sizes and records each figure as soon as it is measured (FIGURES names the
file). A peer that is missing, raises, dies or hangs costs its own line. RESULTS names a folder for the results and for what the processes
print.

The processes take turns on the device. The ceilings come first, then our operators, each alone. Then all others start CUDA and compile at
the same time, in shared turns in which nothing is timed, and are checked and timed one after another, alone. Imports need no turn. A turn
ends with its process, so that nothing of an earlier peer is left on the GPU. The ceilings are measured again at the end. On a CPU one
process runs at a time, unless --jobs says otherwise. All operators in one run share their starts and compilations, which are most of it.

The exit code is 1 where one of our operators failed, was wrong or was not reached, or a figure was not finite; 2 for a command line that
cannot be measured here; 143 or 130 where a signal has ended it; 0 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from _device import has_gpu
from _peers import OPERATORS, PEERS, Peer, given
from _turns import NOT_REACHED, STOPPED, Job, Message, run

HERE = Path(__file__).parent
OURS = {
    "multi_token_loss": "ours, loss and gradient in one go",
    "patch_embedding": "ours",
    "linear_multi_token_loss": "ours, chunks of 4096",
}
"""What ratios are to."""
SIZE = ("operator", "rows", "vocab", "hidden", "patch_size", "dtype")


def from_one(word: str) -> int:
    """A whole number from 1, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} (allowed: whole numbers from 1)")
    return int(word)


def above_zero(word: str) -> float:
    """Seconds, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is no number above 0.
    """
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} (allowed: numbers above 0)")
    return number


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one; naming it saves seconds)")
    parser.add_argument("--operators", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="(default: all)")
    parser.add_argument("--rows", type=from_one, nargs="+", help="positions N (default: 8192 on a GPU, 1024 on a CPU)")
    parser.add_argument("--hidden", type=from_one, nargs="+", help="H (default: 1024; on a GPU 4096, and for the embedding 1024 too)")
    parser.add_argument("--vocab", type=from_one, nargs="+", help="V (default: 32000, on a GPU 128256 too, for linear alone)")
    parser.add_argument("--patch-sizes", type=from_one, nargs="+", help="K (default: 1 4; on a GPU loss 4 1 8, linear 4 1, embedding 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="a few rows of everything, ours in all dtypes: shows that it runs, no more")
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="only peers whose names contain one of these words; see _peers.py")
    parser.add_argument(
        "--peer", nargs="+", default=[], metavar="NAME=MODULE:FUNCTION", help="further ones, with the signatures that _peers.py describes"
    )
    parser.add_argument("--rounds", type=from_one, help="of timing (default: 20 on a GPU, fewer where they are slow; 7 on a CPU)")
    parser.add_argument("--threads", type=from_one, help="of a CPU (default: one a core)")
    parser.add_argument("--jobs", type=from_one, help="processes at a time (default: one a core, at most 16; 1 on a CPU)")
    parser.add_argument("--peer-seconds", type=above_zero, help="no turn takes longer (default: 30 on a GPU, 600 on a CPU)")
    parser.add_argument("--budget", type=above_zero, help="seconds for everything; what does not fit is listed (default: no limit)")
    args = parser.parse_args()
    try:
        args.peer = [(text, given(text)) for text in args.peer]
    except ValueError as error:
        parser.error(str(error))
    names = dict.fromkeys(peer.name for operator in args.operators for peer in PEERS[operator])
    known = [name for operator in PEERS for name in (peer.name.lower() for peer in PEERS[operator])]
    unknown = [word for word in args.peers or [] if not any(word.lower() in name for name in known)]
    if unknown or (args.peers and not args.peer and not any(word.lower() in name.lower() for word in args.peers for name in names)):
        parser.error(f"--peers {' '.join(unknown or args.peers)}: no such peer (allowed: words from {'; '.join(names)})")
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not has_gpu():
        print("no GPU: give --device cpu, or leave --device out", file=sys.stderr)
        raise SystemExit(2)
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.rounds = args.rounds or (2 if args.tiny else 20 if cuda else 7)
    args.jobs = args.jobs or (max(2, min(16, os.cpu_count() or 2)) if cuda else 1)
    args.peer_seconds = args.peer_seconds or (30 if cuda else 600)
    return args


def sizes_of(operator: str, args: argparse.Namespace) -> list[Message]:
    """The sizes of an operator, most telling first."""
    cuda = args.device == "cuda"
    if args.tiny:
        rows, hiddens, vocabs, patch_sizes = [24], [32], [160], [1, 4]
    elif cuda:
        rows = [8192]
        hiddens = [4096, 1024] if operator == "embedding" else [4096]
        vocabs = [128_256] if operator == "linear" else [128_256, 32_000]
        patch_sizes = {"loss": [4, 1, 8], "embedding": [4], "linear": [4, 1]}[operator]
    else:
        rows, hiddens, vocabs, patch_sizes = [1024], [1024], [32_000], [1, 4]
    rows, vocabs, patch_sizes = args.rows or rows, args.vocab or vocabs, args.patch_sizes or patch_sizes
    hidden = [None] if operator == "loss" else args.hidden or hiddens
    return [
        {"rows": n, "vocab": v, "hidden": h, "patch_size": k, "dtype": args.dtype}
        for k in patch_sizes
        for h in hidden
        for v in vocabs
        for n in rows
    ]


def in_other_dtypes(operator: str, args: argparse.Namespace) -> list[Message]:
    """Of ours alone, at one size: the other dtypes. On a GPU or with --tiny, where no sizes were asked for."""
    asked = args.rows or args.hidden or args.vocab or args.patch_sizes
    if asked or not (args.tiny or args.device == "cuda"):
        return []
    size = sizes_of(operator, args)[0] if args.tiny else {"rows": 8192, "vocab": 32_000, "hidden": 1024, "patch_size": 4}
    size["hidden"] = None if operator == "loss" else size["hidden"]
    return [{**size, "dtype": dtype} for dtype in ("bfloat16", "float16", "float32") if dtype != args.dtype]


def chosen(operator: str, args: argparse.Namespace) -> list[tuple[Peer, str | None]]:
    """The peers of an operator, and what those from the command line were given as."""
    peers: list[tuple[Peer, str | None]] = [(peer, None) for peer in PEERS[operator]]
    if args.peers is not None:
        words = [word.lower() for word in args.peers]
        peers = [(peer, text) for peer, text in peers if any(word in peer.name.lower() for word in words)]
    elif args.device != "cuda":
        peers = [(peer, text) for peer, text in peers if not peer.gpu]
    return peers + [(peer, text) for text, peer in args.peer]


class Collector:
    """What the children have told.

    Args:
        args: the command line.
        jobs: job's name -> (operator, peer); ceilings are not among them.
        logs: the folder of what the children print.
    """

    def __init__(self, args: argparse.Namespace, jobs: dict[str, tuple[str, Peer]], logs: Path) -> None:
        self.args, self.jobs, self.logs = args, jobs, logs
        self.figures: list[Message] = []
        self.failures: list[Message] = []
        self.ceilings: list[Message] = []
        self.answer: Message = {"ceilings": {}}
        self.machine: Message | None = None
        self.ours_failed = self.ours_not_reached = self.not_finite = False

    def heard(self, job: Job, message: Message) -> None:
        """Takes a child's message."""
        if "ceilings" in message:
            self.answer["ceilings"], self.machine = message["ceilings"], message["machine"]
            return
        figure = message["figure"]
        self.not_finite |= "not_finite" in figure
        if figure["kind"] == "kernel_failed":
            self.failed(job, figure)
        elif figure["kind"] == "ceiling":
            self.ceilings.append(figure)
            print(f"ceiling {figure['when']}: {figure['name']} {_number(figure['value'], '.4g')}", flush=True)
        else:
            self.figures.append(figure)
            print(f"{_title(figure)}: {figure['peer']}: {_number(figure['forward_backward_ms'], '.3f')} ms", flush=True)

    def failed(self, job: Job, figure: Message) -> None:
        """Notes a failure, which is fatal where it is ours."""
        self.failures.append(figure)
        ours = job.name in self.jobs and self.jobs[job.name][1].ours
        if ours and not_reached(figure["error"]):
            self.ours_not_reached = True
        elif ours:
            self.ours_failed = True
        print(f"{'FAILED' if ours else 'left out'}: {_title(figure)}: {figure['peer']}: {figure['error']}", flush=True)

    def ended(self, job: Job, reason: str | None) -> None:
        """Notes a child's end, and writes what there is."""
        ours = job.name in self.jobs and self.jobs[job.name][1].ours
        if ours and (log := self.logs / f"{job.name}.log").exists() and (lines := log.read_text(errors="replace").splitlines()):
            print("\n".join(lines[-20:]), flush=True)
        if reason is not None:
            from _measure import record

            operator, name = (None, "ceilings") if job.name not in self.jobs else (self.jobs[job.name][0], self.jobs[job.name][1].name)
            self.failed(job, record("kernel_failed", operator=OPERATORS.get(operator or ""), peer=name, error=reason))
        self.write(tell=False)

    def what_is_wrong(self) -> str | None:
        """Why the run has failed, or None where it has not."""
        reasons = {"one of our operators failed": self.ours_failed, "one of our operators was not reached in time": self.ours_not_reached}
        reasons["a figure is not finite"] = self.not_finite
        return "; ".join(reason for reason, holds in reasons.items() if holds) or None

    def rows(self) -> list[Message]:
        """The figures, with their ratios to ours."""
        ours = {_size(figure): figure["forward_backward_ms"] for figure in self.figures if figure["peer"] == OURS[figure["operator"]]}
        rows = []
        for figure in self.figures:
            reference, own = ours.get(_size(figure)), figure["forward_backward_ms"]
            rows.append({**figure, "times_ours": own / reference if reference and own else None})
        return rows

    def write(self, tell: bool) -> None:
        """The results so far as JSON. A rehearsal's are written where RESULTS asks for them, not among those that are kept."""
        if self.args.tiny and not os.environ.get("RESULTS"):
            return
        import torch
        from _measure import machine, write_results

        name = "kernels" if len(set(self.args.operators)) == len(PEERS) else "-".join(["kernels", *self.args.operators])
        results = {"dtype": f"torch.{self.args.dtype}", "rounds": self.args.rounds, "ceilings": self.answer["ceilings"]}
        results |= {"measured_ceilings": self.ceilings, "rows": self.rows(), "failed": self.failures}
        described = self.machine or machine(torch.device("cpu"))
        write_results("kernels-tiny" if self.args.tiny else name, torch.device(self.args.device), results, tell, described)

    def print_tables(self) -> None:
        """One table for each size, and what is missing."""
        from _measure import print_table

        rows = self.rows()
        for size in dict.fromkeys(_size(row) for row in rows):
            of_size = [row for row in rows if _size(row) == size]
            unit = "TFLOP/s" if "tflop_per_second" in of_size[0] else "GB/s"
            print_table(
                _title(of_size[0]),
                ["peer", "forward ms", "forward + backward ms", "x ours", unit, "of ceiling", "peak MB", "error"],
                [_line(row) for row in of_size],
            )
        if self.failures:
            lines = [[_title(failure), str(failure["peer"]), str(failure["error"])] for failure in self.failures]
            print_table("failed, left out or not reached", ["operator", "peer", "reason"], lines)


def not_reached(reason: str) -> bool:
    """Whether a child ended for the budget alone."""
    return reason.startswith((NOT_REACHED, STOPPED))


def _size(figure: Message) -> tuple[Any, ...]:
    return tuple(figure.get(name) for name in SIZE)


def _title(figure: Message) -> str:
    parts = [str(figure.get("operator") or "machine")]
    names = {"rows": "N", "vocab": "V", "hidden": "H", "patch_size": "K"}
    parts += [f"{short} = {figure[name]:,}" for name, short in names.items() if figure.get(name) is not None]
    return ", ".join(parts + ([figure["dtype"]] if figure.get("dtype") else []))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(row: Message) -> list[str]:
    rate = row.get("tflop_per_second", row.get("gb_per_second"))
    return [
        row["peer"],
        _number(row["forward_ms"], ".3f"),
        _number(row["forward_backward_ms"], ".3f"),
        _number(row["times_ours"], ".2f"),
        _number(rate, ".3g"),
        _number(row["share_of_ceiling"], ".0%"),
        _number(row["peak_mb"], ".1f"),
        _number(row["error"], ".1e"),
    ]


def plan(args: argparse.Namespace) -> tuple[list[Job], dict[str, tuple[str, Peer]]]:
    """The children in the order of their turns, and which operator and peer each one is."""
    common = {"device": args.device, "rounds": args.rounds, "threads": args.threads, "tiny": args.tiny, "shared": args.jobs > 1}
    command = (sys.executable, str(HERE / "_operators.py"))
    largest = max((size["rows"] * size["vocab"] for size in sizes_of("loss", args)), default=0) if "loss" in args.operators else None
    ceilings = {**common, "operator": None, "dtype": args.dtype, "logits": largest}
    jobs = [Job("ceilings", (*command, json.dumps(ceilings)), urgent=True)]
    known: dict[str, tuple[str, Peer]] = {}
    everyone = [(operator, peer, text) for operator in dict.fromkeys(args.operators) for peer, text in chosen(operator, args)]
    for operator, peer, text in sorted(everyone, key=lambda item: not item[1].ours):
        sizes = [size for size in sizes_of(operator, args) if not peer.patch_sizes or size["patch_size"] in peer.patch_sizes]
        sizes += in_other_dtypes(operator, args) if peer.ours else []
        # Compiling takes longer than measuring, and cores are many: a process for each patch size.
        apart = peer.compiles and args.device == "cuda"
        groups = dict.fromkeys(size["patch_size"] if apart else None for size in sizes)
        for group in groups:
            part = [size for size in sizes if group in (None, size["patch_size"])]
            work = {**common, "operator": operator, "peer": peer.name, "given": text, "sizes": part}
            name = f"{len(jobs):02}-{operator}"
            jobs.append(Job(name, (*command, json.dumps(work)), peer.ours))
            known[name] = (operator, peer)
    return jobs, known


def environment() -> dict[str, str]:
    """Of the children: they find the package and what `--peer` names, and compile a few kernels each, which needs no pool of processes."""
    paths = [str(HERE.parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class ExitReport:
    """What a signal does: it ends the run, whose children end with it, and what they have told is printed.

    While torch is imported it waits: an exception in the midst of that may crash the process.
    """

    def __init__(self) -> None:
        self.importing, self.number = False, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            return
        self.number = number
        if not self.importing:
            self.leave()

    def leave(self) -> None:
        """Ends.

        Raises:
            SystemExit: always.
        """
        print(f"ended by {signal.Signals(self.number).name}", file=sys.stderr, flush=True)
        raise SystemExit(128 + self.number)

    def import_torch(self) -> None:
        """Imports what takes seconds, in which no turn would be given later."""
        self.importing = True
        importlib.import_module("_measure")
        self.importing = False
        if self.number:
            self.leave()


def main() -> None:
    """Measures and prints."""
    began = time.monotonic()
    args = parse()
    jobs, known = plan(args)
    ending = ExitReport()
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(os.environ.get("RESULTS") or folder) / "kernels-logs"
        logs.mkdir(parents=True, exist_ok=True)
        collector = Collector(args, known, logs)
        try:
            run(
                jobs,
                logs,
                environment(),
                args.jobs,
                args.peer_seconds,
                args.budget,
                collector.heard,
                collector.ended,
                collector.answer,
                began,
                meanwhile=ending.import_torch,
            )
        finally:
            collector.print_tables()
            collector.write(tell=True)
    print(f"{len(collector.figures)} figures, {len(collector.failures)} failures, {time.monotonic() - began:.1f} s", flush=True)
    if (wrong := collector.what_is_wrong()) is not None:
        raise SystemExit(wrong)


if __name__ == "__main__":
    main()
