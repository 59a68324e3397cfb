"""Decides which checkpoints are kept: the newest, those at the end of a stage, and one per given number of steps or tokens.

In: a run's folder in which a checkpoint has just been committed and verified. Out: the folders that were removed. Checkpoints of later
steps belong to a branch that --load went back from; they are neither counted nor removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.checkpoint.commit import discard, list_checkpoints, step_of, verify


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep.

    Args:
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        steps: steps whose checkpoints are kept forever, such as the ends of stages.
        every: keep forever the first checkpoint at or after each multiple of this many steps; 0: no such rule.
        every_tokens: the same rule with a number of tokens.
        tokens_of: returns the number of tokens read up to a step.
    """

    keep_last: int
    steps: frozenset[int] = frozenset()
    every: int = 0
    every_tokens: int = 0
    tokens_of: Callable[[int], int] = int

    def kept_forever(self, steps: Iterable[int]) -> set[int]:
        """Returns those of the given steps whose checkpoints are kept forever."""
        steps = sorted(steps)
        kept = set(self.steps & set(steps))
        if self.every:
            kept |= first_of_each(steps, [step // self.every for step in steps])
        if self.every_tokens:
            kept |= first_of_each(steps, [self.tokens_of(step) // self.every_tokens for step in steps])
        return kept


def first_of_each(steps: Sequence[int], windows: Sequence[int]) -> set[int]:
    """Returns the first step of each window except window 0; the result stays the same when other steps are removed."""
    first: dict[int, int] = {}
    for step, window in zip(steps, windows, strict=True):
        first.setdefault(window, step)
    return {step for window, step in first.items() if window > 0}


def prune(save: Path, committed: int, retention: Retention) -> list[Path]:
    """Removes old checkpoints.

    Only checkpoints whose files have the right sizes count towards `keep_last`, so that damaged checkpoints do not displace valid ones.

    Args:
        save: the run's folder.
        committed: step of the checkpoint that was just committed and verified.
        retention: which checkpoints to keep.

    Returns:
        The folders that were removed.
    """
    known = {folder: step for folder in list_checkpoints(save) if (step := step_of(folder)) is not None and step <= committed}
    newest = next(iter(known), None)
    if retention.keep_last <= 0 or newest is None or known[newest] != committed or verify(newest, full=False):
        return []
    forever = retention.kept_forever(known.values())
    valid, removed = 0, []
    for folder, step in known.items():
        if valid >= retention.keep_last:
            if step not in forever and discard(folder):
                removed.append(folder)
        elif not verify(folder, full=False):
            valid += 1
    return removed
