"""A short soak test; `python -m tests.faults.soak` runs a long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.faults.preload import build
from tests.faults.soak.ledger import WIDTH, Ledger
from tests.faults.soak.life import KINDS, LAYOUT
from tests.faults.soak.runs import soak


def test_a_run_that_meets_fault_after_fault_ends_like_an_undisturbed_one(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    kinds = ["one layout", "layouts", "small disk"]
    tally = soak(tmp_path, ledger, seed=5, faults=6, each=0, tokens=4500, kinds=kinds, faults_of_a_run=(3, 3))
    assert {"one layout", "layouts"} <= set(tally.runs) and tally.starts > 3
    rows = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert len(rows) == len(ledger.rows) >= 6 and all(row["then"] for row in rows)
    table = ledger.table().splitlines()
    assert max(map(len, table)) <= WIDTH and all(f"|{row.number:<4} |" in "".join(table) for row in ledger.rows)
    assert f"| {KINDS[LAYOUT][0]} | {ledger.counts[LAYOUT]} |" in ledger.summary(KINDS)


def test_the_wall_clock_of_a_process_jumps(tmp_path):
    """What the soak test loads into the ranks: waits last as long as before, and the monotonic clock does not move."""
    library = build("clock", tmp_path)
    if library is None:
        pytest.skip("needs a C compiler")
    code = """
import struct, threading, time, sys
def jump(seconds): open(sys.argv[1], "r+b").write(struct.pack("d", seconds))
began, monotonic = time.time(), time.monotonic()
jump(-3600.0)
threading.Event().wait(0.01)
back = time.time() - began
jump(86400.0)
threading.Event().wait(0.01)
print(back, time.time() - began, time.monotonic() - monotonic)
"""
    (tmp_path / "clock").write_bytes(bytes(8))
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULT_CLOCK": str(tmp_path / "clock")}
    words = [sys.executable, "-c", code, str(tmp_path / "clock")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True, timeout=60)
    back, forward, monotonic = map(float, done.stdout.split())
    assert 0 <= back + 3600 < 30 and 0 <= forward - 86400 < 30 and 0 < monotonic < 30
