"""Writes SAVE/spans/rank-R.jsonl: every span of tokens that a rank reads, so that a run can be audited.

In: micro-batches. Out: one line for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_patch.data.collate import PatchBatch
from megatron_patch.stages import Stage
from megatron_patch.training.callbacks.base import Callback
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter


class SpanLog(Callback):
    """Writes the span log of one rank; of ranks that share samples the first one writes them.

    Args:
        folder: folder of the span logs.
        rank: this rank.
        data_parallel_rank: which replica this rank belongs to.
    """

    def __init__(self, folder: Path, rank: int, data_parallel_rank: int) -> None:
        self._lines = JsonlWriter(folder / f"rank-{rank:05d}.jsonl")
        self._data_parallel_rank = data_parallel_rank

    def on_batches(self, step: int, stage: Stage, batches: Sequence[PatchBatch]) -> None:
        """Writes a line: for each micro-batch the [corpus, first token, number of tokens] of its samples."""
        if self._data_parallel_rank % stage.context_parallel_size:
            return
        spans = [[[span.corpus, span.start, span.length] for span in batch.spans] for batch in batches]
        self._lines.add({"step": step, "stage": stage.name, "spans": spans})

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
