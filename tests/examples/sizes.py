"""The plan of the plain loop's tests, with which other trainers are compared."""

from __future__ import annotations

from typing import Any

from examples.integrations import plain_loop
from megatron_patch.library import StagePlan, build_plan


def plain_plan(**more: Any) -> StagePlan:
    """Returns the plan of `plain_loop.main` with --train-tokens 24576: 8 steps of patches, 4 of tokens."""
    sizes = {"patch_size": 4, "train_tokens": 12 * 2048, "seq_length": plain_loop.POSITIONS, "global_batch_size": 32}
    return build_plan("patch-train", **sizes, lr=3e-3, lr_warmup_tokens=2048, **more)
