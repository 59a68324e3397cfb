"""Soak test: a tiny run is killed, moved, its disk filled, its clock turned and its checkpoints damaged, again and again.

    python -m tests.faults.soak --faults 300 --each 20 --seed 1 --ledger FOLDER

Each run has one of four kinds:

- one layout: two ranks, ZeRO 1, with and without --async-save;
- layouts: each start has another number of ranks and another ZeRO level, with data, tensor or pipeline parallelism;
- compiled: as one layout, with --compile, and killed while blocks are compiled;
- small disk: as one layout, on a file system that is filled and emptied.

Every start is ended at a random moment, until the run has had its share of faults and may end. On one layout the losses of the whole run,
and its last weights and moments, must be bit for bit those of an undisturbed run, compiled ones those of a compiled run; across layouts
losses must agree within 1e-4. Every start must resume from the newest valid checkpoint, and no committed step may be lost. The ledger has a
row for each fault; it is written as JSON lines, as a table, and as rows for a document.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from megatron_patch.utils.units import plural
from tests.distributed.ranks import start_server
from tests.faults.preload import build
from tests.faults.soak.ledger import WIDTH, Ledger
from tests.faults.soak.life import KINDS, Tally
from tests.faults.soak.runs import RUNS, soak


def summary(tally: Tally, seed: int) -> str:
    """Returns what a document says about a soak test, in Markdown."""
    runs = ", ".join(f"{number} {kind}" for kind, number in tally.runs.items())
    text = (
        f"{time.strftime('%Y-%m-%d')}, {plural(os.cpu_count() or 1, 'CPU core')}, seed {seed}: {len(tally.ledger.rows)} faults in"
        f" {tally.ledger.minutes:.0f} minutes, {tally.starts} starts, {sum(tally.runs.values())} runs ({runs}), {tally.skipped} checkpoints"
        f" skipped. Across layouts, losses differ from those of the undisturbed run by {tally.largest_difference:.1e} at most; in all other"
        f" runs, losses, weights and moments are the same bit for bit."
    )
    return f"{textwrap.fill(text, WIDTH)}\n\n{tally.ledger.summary(KINDS)}\n"


def main() -> int:
    """Runs the command line; prints the summary, and writes the ledger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="number of faults in all")
    parser.add_argument("--each", type=int, default=20, help="number of faults of each kind, at least")
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=9000, help="tokens of a run")
    parser.add_argument("--kinds", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--ledger", type=Path, default=Path("build/soak"), help="folder for the ledger")
    args = parser.parse_args()
    args.ledger.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.ledger / "ledger.jsonl")
    ledger.path.write_text("")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the small file system is unmounted
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    library = build("clock", folder)
    start_server({"LD_PRELOAD": str(library)} if library else {})
    try:
        tally = soak(folder, ledger, args.seed, args.faults, args.each, args.minutes, args.tokens, args.kinds, clocks=library is not None)
    except BaseException:
        print(f"the files of the failed run are in {folder}", file=sys.stderr)
        raise
    finally:
        (args.ledger / "ledger.md").write_text(ledger.table())
    shutil.rmtree(folder)
    text = summary(tally, args.seed)
    (args.ledger / "summary.md").write_text(text)
    print(text)
    wanted = {fault for kind in args.kinds for fault in RUNS[kind]}
    missing = {fault: args.each - ledger.counts[fault] for fault in wanted if ledger.counts[fault] < args.each}
    if missing or len(ledger.rows) < args.faults:
        print(f"not enough faults within {args.minutes:g} minutes: {missing or len(ledger.rows)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
