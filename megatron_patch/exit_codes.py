"""How the program ends: one exit code for each way, for scripts, and a line of advice for each, which is printed last."""

from __future__ import annotations

import enum

from megatron_patch.programs import as_called


class ExitCode(enum.IntEnum):
    """Exit codes of all programs in this repository. Any other code above 128 means that a signal ended a rank."""

    DONE = 0
    INTERNAL = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    SICK = 5
    CORRUPTION = 6
    DOES_NOT_FIT = 7
    PREEMPTED = 75
    HANG = 76
    INTERRUPTED = 130

    @property
    def advice(self) -> str:
        """What happened and what to do, in one line."""
        return as_called(_ADVICE[self])


_ADVICE = {
    ExitCode.DONE: "done",
    ExitCode.INTERNAL: "an error of the program or the machine, see the traceback; the same command resumes from the newest checkpoint",
    ExitCode.CONFIG: "flags or configuration: fix the problem named above",
    ExitCode.DATA: "data: fix the problem named above; the same command then resumes from the newest checkpoint",
    ExitCode.CHECKPOINT: "a checkpoint: fix the problem named above; tools/inspect_checkpoint.py shows which checkpoints are valid",
    ExitCode.SICK: "steps were rejected: check SAVE/events.jsonl; lower --lr, or resume with --on-spike skip or rewind",
    ExitCode.CORRUPTION: "ranks that must agree differ: repair or exclude what is named above; the same command then resumes",
    ExitCode.DOES_NOT_FIT: "the plan needs more memory than a device has: change the layout as described above",
    ExitCode.PREEMPTED: "stopped on request, and all steps that were taken are saved: the same command resumes",
    ExitCode.HANG: "no progress: the stacks of all ranks are in SAVE/stacks; the same command resumes from the newest checkpoint",
    ExitCode.INTERRUPTED: "interrupted twice, so nothing was saved at the end: the same command resumes from the newest checkpoint",
}
