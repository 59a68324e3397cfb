"""SAVE/spans/rank-R.jsonl: every span of tokens that a rank reads, the ledger of an audit. In: micro-batches. Out: one line a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_patch.data.patch_dataset import PatchBatch
from megatron_patch.stages import Stage
from megatron_patch.training.callbacks.base import Callback, RunStart
from megatron_patch.training.callbacks.metrics import truncate


class SpanLog(Callback):
    """Writes one rank's ledger.

    Args:
        folder: of the ledgers.
        rank: this rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank-{rank:05d}.jsonl"
        self._file: Any = None

    def on_start(self, record: RunStart) -> None:
        """Opens the ledger behind the step that the run goes on from."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        truncate(self._path, record.step)
        self._file = self._path.open("a", encoding="utf-8")

    def on_batches(self, step: int, stage: Stage, batches: Sequence[PatchBatch]) -> None:
        """One line: [corpus, first token, tokens] of every sample, micro-batch by micro-batch."""
        spans = [[[span.corpus, span.start, span.length] for span in batch.spans] for batch in batches]
        self._file.write(json.dumps({"step": step, "stage": stage.name, "spans": spans}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the ledger."""
        if self._file is not None:
            self._file.close()
            self._file = None
