"""How the program ends: one code for each way, and what to do then. Scripts look at the code, people at the last line."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every program here; other codes above 128 are a rank that a signal ended."""

    DONE = 0
    INTERNAL = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    SICK = 5
    CORRUPTION = 6
    PREEMPTED = 75
    HANG = 76
    INTERRUPTED = 130

    @property
    def advice(self) -> str:
        """What happened, and what to do, in a line."""
        return _ADVICE[self]


_ADVICE = {
    ExitCode.DONE: "done",
    ExitCode.INTERNAL: "an error of the program or the machine, see the traceback; the same command goes on from the newest checkpoint",
    ExitCode.CONFIG: "flags or configuration: change what the message says",
    ExitCode.DATA: "data: change what the message says; the same command then goes on from the newest checkpoint",
    ExitCode.CHECKPOINT: "a checkpoint: change what the message says; tools/inspect_checkpoint.py tells what is sound",
    ExitCode.SICK: "training is sick: look at SAVE/events.jsonl; lower --lr, or go on with --on-spike skip or rewind",
    ExitCode.CORRUPTION: "ranks that must agree do not: leave out the node that is named; it goes on from the newest checkpoint",
    ExitCode.PREEMPTED: "stopped on request, all is saved: the same command goes on",
    ExitCode.HANG: "no progress: stacks of all ranks are in SAVE/stacks; the same command goes on from the newest checkpoint",
    ExitCode.INTERRUPTED: "interrupted twice, so nothing more was saved: the same command goes on from the newest checkpoint",
}
