"""How the stages of a plan divide a corpus. In: a plan, a corpus, the split. Out: plain values for a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.stages import StagePlan


def stage_division(plan: StagePlan, corpus: TokenCorpus, split: str) -> dict[str, Any]:
    """Returns how a run that reads only this corpus divides it.

    Args:
        plan: the plan of the run; blends of its stages are ignored.
        corpus: the data.
        split: relative sizes of the parts for training, validation and test.

    Returns:
        training_tokens, validation_tokens, test_tokens; block_tokens; blocks; unread_tokens: the end of the training part, which does
        not fill a block; stages: for each stage its name, patch_size, positions, samples, blocks, tokens, share of the training part,
        and epochs: epochs of the training part from the start of the run to the end of the stage.

    Raises:
        DataError: the training part is shorter than a block.
    """
    alone = StagePlan(tuple(replace(stage, blend=None) for stage in plan.stages), plan.block_tokens)
    stream = TrainStream(alone, {"x": corpus}, (("x", 1.0),), split, seed=0)
    parts = corpus.ranges(split)
    in_blocks = stream.blocks[0] * alone.block_tokens
    stages = [
        {
            "stage": stage.name,
            "patch_size": stage.patch_size,
            "positions": stage.positions,
            "samples": stage.samples,
            "blocks": alone.last_block(index) - alone.first_block(index),
            "tokens": stage.tokens,
            "share": round(stage.tokens / in_blocks, 6),
            "epochs": round(stream.corpus_usage(index)[0].epochs_by_end, 6),
        }
        for index, stage in enumerate(alone.stages)
    ]
    return {
        **{f"{name}_tokens": last - first for name, (first, last) in zip(("training", "validation", "test"), parts, strict=True)},
        "block_tokens": alone.block_tokens,
        "blocks": stream.blocks[0],
        "unread_tokens": parts[0][1] - parts[0][0] - in_blocks,
        "stages": stages,
    }
