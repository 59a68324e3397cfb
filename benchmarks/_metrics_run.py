"""A run of pretrain_gpt_patch.py that writes its metrics alone, and no checkpoint: a launcher's ranks start this file in its place.

METRICS names the file; rank 0 writes it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_patch.engine.environment import ranks_from_environment, use_expandable_segments

use_expandable_segments()

from _training import resolved, train  # noqa: E402

from megatron_patch.training.callbacks.base import Callback  # noqa: E402
from megatron_patch.training.callbacks.metrics import Metrics  # noqa: E402
from megatron_patch.training.trainer import Trainer  # noqa: E402


def listeners(trainer: Trainer) -> list[Callback]:
    """The metrics file, on rank 0."""
    return [Metrics(Path(os.environ["METRICS"]))] if trainer.grid.rank == 0 else []


if __name__ == "__main__":
    train(*resolved(sys.argv[1:], ranks_from_environment()[1]), listeners)
