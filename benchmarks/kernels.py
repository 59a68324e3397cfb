#!/usr/bin/env python
"""Compares the fused operators with their peers: time, bandwidth, memory, error.

    python benchmarks/kernels.py                        on this machine, at the
                                                        sizes of docs/performance.md
    python benchmarks/kernels.py --operators loss --rows 2048 --vocab 32000 --patch-sizes 1 4
    python benchmarks/kernels.py --device cuda --operators linear --budget 35 --peer-seconds 20
    python benchmarks/kernels.py --tiny --device cpu    a few rows of everything,
                                                        in seconds

Peers are the formula of the papers' code, our plain formula, torch.compile of
the shortest formula, torch's fused modules and, if they are installed, Liger,
Megatron core, cut-cross-entropy and quack, which take one label per row.
--peer NAME=MODULE:FUNCTION adds one. Errors are against float64.

Each peer runs in its own process. It measures all of its sizes and records
each figure at once in the file named by FIGURES. A peer that is missing, raises,
dies or hangs affects only its own rows. Results and logs go to the folder named
by RESULTS.

The processes use the device in turn: first the ceilings, then our operators,
each with exclusive access. All others then start CUDA and compile at the same
time with shared access, and are checked and timed one after another with
exclusive access. The ceilings are measured again at the end. On a CPU one
process runs at a time unless --jobs is given. Run all operators in one command:
they share starts and compilation, which take most of the time.

The exit code is 1 if one of our operators failed, was wrong or was not reached,
or a figure was not finite; 2 for a command line that this machine cannot run;
143 or 130 after a signal; else 0.
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
from _device_access import NOT_REACHED, STOPPED, Job, Message, run
from _peers import OPERATORS, PEERS, Peer, parse_peer

HERE = Path(__file__).parent
OURS = {
    "multi_token_loss": "ours, loss and gradient in one go",
    "patch_embedding": "ours",
    "linear_multi_token_loss": "ours, chunks of 4096",
}
"""The variant that `times_ours` compares with, by operator."""
SIZE = ("operator", "rows", "vocab", "hidden", "patch_size", "dtype")


def positive_int(word: str) -> int:
    """Reads a whole number from 1, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} (allowed: whole numbers from 1)")
    return int(word)


def positive_seconds(word: str) -> float:
    """Reads a number of seconds above 0, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
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
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device (default: cuda if there is a GPU; naming it saves seconds)")
    parser.add_argument("--operators", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="operators to measure (default: all)")
    parser.add_argument("--rows", type=positive_int, nargs="+", help="N, number of positions (default: 8192 on a GPU, 1024 on a CPU)")
    parser.add_argument(
        "--hidden", type=positive_int, nargs="+", help="H, hidden size (default: 1024; on a GPU 4096, for the embedding also 1024)"
    )
    parser.add_argument(
        "--vocab", type=positive_int, nargs="+", help="V, vocabulary (default: 32000; on a GPU also 128256, for linear only that)"
    )
    parser.add_argument(
        "--patch-sizes",
        type=positive_int,
        nargs="+",
        help="K, labels per position (default: 1 4; on a GPU loss 4 1 8, linear 4 1, embedding 4)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="test with a few rows of everything, ours in all dtypes")
    parser.add_argument(
        "--peers", nargs="+", metavar="WORD", help="measure only peers whose names contain one of these words; see _peers.py"
    )
    parser.add_argument(
        "--peer", nargs="+", default=[], metavar="NAME=MODULE:FUNCTION", help="further peers, with the signatures that _peers.py lists"
    )
    parser.add_argument("--rounds", type=positive_int, help="timed runs (default: at most 20 on a GPU, 7 on a CPU)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: one per core)")
    parser.add_argument("--jobs", type=positive_int, help="processes at a time (default: one per core, at most 16; 1 on a CPU)")
    parser.add_argument(
        "--peer-seconds", type=positive_seconds, help="longest use of the device by one process (default: 30 on a GPU, 600 on a CPU)"
    )
    parser.add_argument(
        "--budget", type=positive_seconds, help="time limit for everything; peers that were not reached are listed (default: none)"
    )
    args = parser.parse_args()
    try:
        args.peer = [(text, parse_peer(text)) for text in args.peer]
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
        print("no GPU found; give --device cpu, or omit --device", file=sys.stderr)
        raise SystemExit(2)
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.rounds = args.rounds or (2 if args.tiny else 20 if cuda else 7)
    args.jobs = args.jobs or (max(2, min(16, os.cpu_count() or 2)) if cuda else 1)
    args.peer_seconds = args.peer_seconds or (30 if cuda else 600)
    return args


def sizes_of(operator: str, args: argparse.Namespace) -> list[Message]:
    """Returns the sizes of an operator, the most important ones first."""
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


def sizes_in_other_dtypes(operator: str, args: argparse.Namespace) -> list[Message]:
    """Returns one size in the other dtypes, for our operators: on a GPU or with --tiny, unless sizes were given."""
    given = args.rows or args.hidden or args.vocab or args.patch_sizes
    if given or not (args.tiny or args.device == "cuda"):
        return []
    size = sizes_of(operator, args)[0] if args.tiny else {"rows": 8192, "vocab": 32_000, "hidden": 1024, "patch_size": 4}
    size["hidden"] = None if operator == "loss" else size["hidden"]
    return [{**size, "dtype": dtype} for dtype in ("bfloat16", "float16", "float32") if dtype != args.dtype]


def selected_peers(operator: str, args: argparse.Namespace) -> list[tuple[Peer, str | None]]:
    """Returns the selected peers of an operator, each with its --peer argument or None."""
    peers: list[tuple[Peer, str | None]] = [(peer, None) for peer in PEERS[operator]]
    if args.peers is not None:
        words = [word.lower() for word in args.peers]
        peers = [(peer, text) for peer, text in peers if any(word in peer.name.lower() for word in words)]
    elif args.device != "cuda":
        peers = [(peer, text) for peer, text in peers if not peer.gpu]
    return peers + [(peer, text) for text, peer in args.peer]


class Collector:
    """Collects the results of the children.

    Args:
        args: the parsed command line.
        jobs: operator and peer by name of the job; the ceilings are not included.
        logs: folder with the output of the children.
    """

    def __init__(self, args: argparse.Namespace, jobs: dict[str, tuple[str, Peer]], logs: Path) -> None:
        self.args, self.jobs, self.logs = args, jobs, logs
        self.figures: list[Message] = []
        self.failures: list[Message] = []
        self.ceilings: list[Message] = []
        self.grant: Message = {"ceilings": {}}
        self.machine: Message | None = None
        self.ours_failed = self.ours_not_reached = self.not_finite = False

    def on_message(self, job: Job, message: Message) -> None:
        """Handles a message of a child."""
        if "ceilings" in message:
            self.grant["ceilings"], self.machine = message["ceilings"], message["machine"]
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
        """Records a failure; a failure of our operators fails the benchmark."""
        self.failures.append(figure)
        ours = job.name in self.jobs and self.jobs[job.name][1].ours
        if ours and not_reached(figure["error"]):
            self.ours_not_reached = True
        elif ours:
            self.ours_failed = True
        print(f"{'FAILED' if ours else 'skipped'}: {_title(figure)}: {figure['peer']}: {figure['error']}", flush=True)

    def on_end(self, job: Job, reason: str | None) -> None:
        """Handles the end of a child and writes the results so far."""
        ours = job.name in self.jobs and self.jobs[job.name][1].ours
        if ours and (log := self.logs / f"{job.name}.log").exists() and (lines := log.read_text(errors="replace").splitlines()):
            print("\n".join(lines[-20:]), flush=True)
        if reason is not None:
            from _measure import record

            operator, name = (None, "ceilings") if job.name not in self.jobs else (self.jobs[job.name][0], self.jobs[job.name][1].name)
            self.failed(job, record("kernel_failed", operator=OPERATORS.get(operator or ""), peer=name, error=reason))
        self.write(verbose=False)

    def failure_reason(self) -> str | None:
        """Returns why the benchmark has failed, or None."""
        reasons = {"one of our operators failed": self.ours_failed, "one of our operators was not reached in time": self.ours_not_reached}
        reasons["a figure is not finite"] = self.not_finite
        return "; ".join(reason for reason, holds in reasons.items() if holds) or None

    def rows(self) -> list[Message]:
        """Returns the figures with the ratio of their time to ours."""
        ours = {_size(figure): figure["forward_backward_ms"] for figure in self.figures if figure["peer"] == OURS[figure["operator"]]}
        rows = []
        for figure in self.figures:
            reference, time_of_peer = ours.get(_size(figure)), figure["forward_backward_ms"]
            rows.append({**figure, "times_ours": time_of_peer / reference if reference and time_of_peer else None})
        return rows

    def write(self, verbose: bool) -> None:
        """Writes the results so far as JSON; with --tiny only if RESULTS names a folder, as they are no measurements."""
        if self.args.tiny and not os.environ.get("RESULTS"):
            return
        import torch
        from _measure import machine, write_results

        name = "kernels" if len(set(self.args.operators)) == len(PEERS) else "-".join(["kernels", *self.args.operators])
        results = {"dtype": f"torch.{self.args.dtype}", "rounds": self.args.rounds, "ceilings": self.grant["ceilings"]}
        results |= {"measured_ceilings": self.ceilings, "rows": self.rows(), "failed": self.failures}
        info = self.machine or machine(torch.device("cpu"))
        write_results("kernels-tiny" if self.args.tiny else name, torch.device(self.args.device), results, verbose, info)

    def print_tables(self) -> None:
        """Prints one table for each size, and the failures."""
        from _measure import print_table

        rows = self.rows()
        for size in dict.fromkeys(_size(row) for row in rows):
            of_size = [row for row in rows if _size(row) == size]
            unit = "TFLOP/s" if "tflop_per_second" in of_size[0] else "GB/s"
            print_table(
                _title(of_size[0]),
                ["peer", "forward ms", "forward + backward ms", "time / ours", unit, "share of ceiling", "peak MB", "error"],
                [_line(row) for row in of_size],
            )
        if self.failures:
            lines = [[_title(failure), str(failure["peer"]), str(failure["error"])] for failure in self.failures]
            print_table("failed, skipped or not reached", ["operator", "peer", "reason"], lines)


def not_reached(reason: str) -> bool:
    """Returns whether a child ended only because of the budget."""
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
    """Returns the jobs in the order of their access, and operator and peer by name of the job."""
    common = {"device": args.device, "rounds": args.rounds, "threads": args.threads, "tiny": args.tiny, "shared": args.jobs > 1}
    command = (sys.executable, str(HERE / "_operators.py"))
    largest = max((size["rows"] * size["vocab"] for size in sizes_of("loss", args)), default=0) if "loss" in args.operators else None
    ceilings = {**common, "operator": None, "dtype": args.dtype, "logits": largest}
    jobs = [Job("ceilings", (*command, json.dumps(ceilings)), urgent=True)]
    known: dict[str, tuple[str, Peer]] = {}
    selected = [(operator, peer, text) for operator in dict.fromkeys(args.operators) for peer, text in selected_peers(operator, args)]
    for operator, peer, text in sorted(selected, key=lambda item: not item[1].ours):
        sizes = [size for size in sizes_of(operator, args) if not peer.patch_sizes or size["patch_size"] in peer.patch_sizes]
        sizes += sizes_in_other_dtypes(operator, args) if peer.ours else []
        # Compilation takes longer than measurement, so each patch size is compiled in its own process.
        separate = peer.compiles and args.device == "cuda"
        groups = dict.fromkeys(size["patch_size"] if separate else None for size in sizes)
        for group in groups:
            part = [size for size in sizes if group in (None, size["patch_size"])]
            work = {**common, "operator": operator, "peer": peer.name, "custom": text, "sizes": part}
            name = f"{len(jobs):02}-{operator}"
            jobs.append(Job(name, (*command, json.dumps(work)), peer.ours))
            known[name] = (operator, peer)
    return jobs, known


def environment() -> dict[str, str]:
    """Returns the environment of the children, with the package and the modules of `--peer` on the path.

    Each child compiles few kernels, so one compilation thread is enough.
    """
    paths = [str(HERE.parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class SignalHandler:
    """Ends the benchmark on a signal; its children end too, and the results so far are printed.

    During the import of torch the signal waits, because an exception there can crash the process.
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
            self.exit()

    def exit(self) -> None:
        """Ends the benchmark.

        Raises:
            SystemExit: always.
        """
        print(f"ended by {signal.Signals(self.number).name}", file=sys.stderr, flush=True)
        raise SystemExit(128 + self.number)

    def import_torch(self) -> None:
        """Imports torch, which takes seconds, before the first access to the device is granted."""
        self.importing = True
        importlib.import_module("_measure")
        self.importing = False
        if self.number:
            self.exit()


def main() -> None:
    """Measures and prints.

    Raises:
        SystemExit: one of our operators failed, or the command line or a signal ended the benchmark.
    """
    began = time.monotonic()
    args = parse()
    jobs, known = plan(args)
    signals = SignalHandler()
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
                collector.on_message,
                collector.on_end,
                collector.grant,
                began,
                while_starting=signals.import_torch,
            )
        finally:
            collector.print_tables()
            collector.write(verbose=True)
    print(f"figures: {len(collector.figures)}, failures: {len(collector.failures)}, {time.monotonic() - began:.1f} s", flush=True)
    if (reason := collector.failure_reason()) is not None:
        raise SystemExit(reason)


if __name__ == "__main__":
    main()
