"""Runs pretrain_gpt_patch.py without checkpoints; a launcher starts this file in its place.

Rank 0 writes the metrics to the file named by the environment variable METRICS.
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


def metrics_callback(trainer: Trainer) -> list[Callback]:
    """Returns the callback that writes the metrics, on rank 0."""
    return [Metrics(Path(os.environ["METRICS"]))] if trainer.grid.rank == 0 else []


if __name__ == "__main__":
    train(*resolved(sys.argv[1:], ranks_from_environment()[1]), metrics_callback)
