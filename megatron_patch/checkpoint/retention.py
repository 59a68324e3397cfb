"""Which checkpoints stay: the last ones, those at stage ends, and one in every so many steps or tokens.

In: a run's folder in which a checkpoint has just been committed, read back from disk. Out: the folders that were removed. What lies
behind that checkpoint is another life's and is neither counted nor removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.checkpoint.commit import checkpoints, discard, step_of, verify


@dataclass(frozen=True)
class Retention:
    """What to keep.

    Args:
        keep_last: how many of the newest; 0: all.
        steps: steps to keep whatever their age, as the ends of stages.
        every: keep the first checkpoint at or behind each multiple of so many steps; 0: none for this reason.
        every_tokens: the same in tokens.
        tokens_of: tokens read at a step.
    """

    keep_last: int
    steps: frozenset[int] = frozenset()
    every: int = 0
    every_tokens: int = 0
    tokens_of: Callable[[int], int] = int

    def kept_forever(self, steps: Iterable[int]) -> set[int]:
        """Those of these steps that stay whatever their age."""
        steps = sorted(steps)
        kept = set(self.steps & set(steps))
        if self.every:
            kept |= first_of_each(steps, [step // self.every for step in steps])
        if self.every_tokens:
            kept |= first_of_each(steps, [self.tokens_of(step) // self.every_tokens for step in steps])
        return kept


def first_of_each(steps: Sequence[int], windows: Sequence[int]) -> set[int]:
    """The first step of each window but window 0; removing other steps does not change the answer."""
    first: dict[int, int] = {}
    for step, window in zip(steps, windows, strict=True):
        first.setdefault(window, step)
    return {step for window, step in first.items() if window > 0}


def prune(save: Path, committed: int, retention: Retention) -> list[Path]:
    """Removes old checkpoints.

    Only checkpoints whose files have their sizes count towards `keep_last`, so that damaged ones push no sound one out.

    Args:
        save: the run's folder.
        committed: the step of the checkpoint that was just committed and verified.
        retention: what to keep.

    Returns:
        The folders that were removed.
    """
    known = {folder: step for folder in checkpoints(save) if (step := step_of(folder)) is not None and step <= committed}
    newest = next(iter(known), None)
    if retention.keep_last <= 0 or newest is None or known[newest] != committed or verify(newest, full=False):
        return []
    forever = retention.kept_forever(known.values())
    sound, removed = 0, []
    for folder, step in known.items():
        if sound >= retention.keep_last:
            if step not in forever and discard(folder):
                removed.append(folder)
        elif not verify(folder, full=False):
            sound += 1
    return removed
