"""Defines the records of what happens in a run and the interface of callbacks, which receive them.

A field of a record has the same name in metrics files, TensorBoard and Weights & Biases. A loss at K = 1 is a `token_loss`, a loss at the
stage's K a `patch_loss`: the two cannot be compared and never share a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.collate import PatchBatch
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Stage
from megatron_patch.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class RunStart:
    """The run starts or resumes.

    Args:
        step: optimizer steps taken so far.
        total_steps: optimizer steps of the full plan.
        total_tokens: tokens of the full plan.
        switches: (tokens read when a stage begins, its name) for each stage but the first.
        tokens: tokens read so far.
        device: name of the devices.
        ranks: number of ranks.
        save: the run's folder (--save), or None.
        token_flops: FLOPs of one token in token-level training.
        whole_cost: FLOPs of the full plan over those of token-level training on the same tokens.
    """

    step: int
    total_steps: int
    total_tokens: int
    switches: tuple[tuple[int, str], ...]
    tokens: int
    device: str
    ranks: int
    save: str | None
    token_flops: float
    whole_cost: float


STEP_METRICS = (
    "lr",
    "grad_norm",
    "tokens_per_second",
    "positions_per_second",
    "tflops",
    "mfu",
    "memory_gib",
    "data_seconds",
    "step_seconds",
)
"""Fields of `StepRecord` that charts and reports show in addition to losses, tokens and cost; the metrics file has every field."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: number of the step in the run, from 1.
        stage: name of its stage.
        stage_index: number of its stage, from 0.
        patch_size: K of its stage.
        tokens: tokens read so far, including this step's.
        cost_tokens: tokens that token-level training would have read for the FLOPs spent so far.
        cost: FLOPs spent so far over those of token-level training on the tokens read so far.
        loss: mean loss in nats per label, at the stage's K.
        lr: learning rate.
        grad_norm: norm of the mean gradient before clipping.
        tokens_per_second: input tokens/s of all ranks together, over a window of steps.
        positions_per_second: positions/s of all ranks together, over a window of steps.
        tflops: model TFLOP/s of one device, over a window of steps.
        mfu: model FLOP/s over the device's peak, or None if the peak is unknown.
        memory_gib: peak memory of this rank so far, in GiB.
        data_seconds: seconds of this step spent waiting for data.
        step_seconds: duration of this step in seconds.
        loss_scale: loss scale in float16, otherwise None.
        skipped: whether the optimizer did not step (a rejected step, or float16 overflow).
        expert_blocks: numbers, from 0, of the blocks with experts, in ascending order; empty in a model without experts, as the others.
        expert_load: for each of these blocks, choices of the expert that most positions chose, relative to the mean of its experts.
        dead_experts: for each of these blocks, the number of experts that no position of the step chose.
        router_entropy: for each of these blocks, mean entropy of the router's scores divided by their sum, in nats.
    """

    step: int
    stage: str
    stage_index: int
    patch_size: int
    tokens: int
    cost_tokens: float
    cost: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    positions_per_second: float
    tflops: float
    mfu: float | None
    memory_gib: float
    data_seconds: float
    step_seconds: float
    loss_scale: float | None = None
    skipped: bool = False
    expert_blocks: tuple[int, ...] = ()
    expert_load: tuple[float, ...] = ()
    dead_experts: tuple[int, ...] = ()
    router_entropy: tuple[float, ...] = ()

    @property
    def worst_block(self) -> tuple[int, float] | None:
        """The block with the largest load, and that load; None in a model without experts. A load that is not finite counts as lowest."""
        pairs = list(zip(self.expert_blocks, self.expert_load, strict=True))
        return max(pairs, key=lambda pair: pair[1] if math.isfinite(pair[1]) else -math.inf) if pairs else None


@dataclass(frozen=True)
class CorpusLoss:
    """The held-out loss of one corpus.

    Args:
        weight: its share in the loss of the evaluation: weight of the blend, or without weights its share of the scored tokens.
        token_loss: mean loss in nats per token, at K = 1.
        patch_loss: mean loss in nats per label, at the stage's K.
        eval_tokens: number of scored tokens.
    """

    weight: float
    token_loss: float
    patch_loss: float
    eval_tokens: int


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation on held-out data.

    Args:
        step: optimizer steps taken so far.
        stage: name of the stage.
        stage_index: number of the stage, from 0.
        patch_size: K of the stage.
        tokens: tokens read so far.
        cost_tokens: tokens that token-level training would have read for the FLOPs spent so far.
        split: name of the evaluated split ("valid").
        token_loss: mean loss in nats per token, at K = 1; of several corpora, the sum of their losses times their weights.
        patch_loss: mean loss in nats per label, at the stage's K; of several corpora likewise.
        eval_tokens: number of scored tokens.
        seconds: duration of the evaluation.
        corpora: the loss of each corpus by its short name, also if there is only one.
    """

    step: int
    stage: str
    stage_index: int
    patch_size: int
    tokens: int
    cost_tokens: float
    split: str
    token_loss: float
    patch_loss: float
    eval_tokens: int
    seconds: float
    corpora: Mapping[str, CorpusLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class SwitchRecord:
    """A switch from one stage to the next.

    Args:
        step: optimizer steps taken so far.
        tokens: tokens read so far.
        from_stage: name of the stage that ended.
        to_stage: name of the stage that begins.
        from_patch_size: K of the stage that ended.
        to_patch_size: K of the stage that begins.
    """

    step: int
    tokens: int
    from_stage: str
    to_stage: str
    from_patch_size: int
    to_patch_size: int


@dataclass(frozen=True)
class SaveRecord:
    """A checkpoint was committed.

    Args:
        step: the step that the checkpoint holds; with --async-save it is older than the last step.
        folder: path of the checkpoint.
        seconds: time from its start until it was published.
        bytes: size of its files.
        stall_seconds: time for which training waited; with --async-save only for the snapshot.
    """

    step: int
    folder: str
    seconds: float
    bytes: int
    stall_seconds: float


@dataclass(frozen=True)
class Event:
    """Something out of the ordinary.

    Args:
        kind: "skip" (a rejected step), "rewind", "straggler" or "collapse" (few experts of a block are used).
        step: optimizer steps taken so far.
        message: a sentence for the user.
        details: plain JSON values for scripts.
    """

    kind: str
    step: int
    message: str
    details: dict[str, Any]


@dataclass(frozen=True)
class RunEnd:
    """The run ends without an error.

    Args:
        reason: "done", "exit interval", or the request to stop ("SIGTERM", "--exit-duration", …).
        step: optimizer steps taken so far.
        tokens: tokens read so far.
        seconds: duration since this start of the run.
        code: exit code (`ExitCode`).
    """

    reason: str
    step: int
    tokens: int
    seconds: float
    code: int = 0


class Callback:
    """Base class of callbacks: every method does nothing unless a subclass overrides it.

    The trainer calls the methods on every rank that has the callback, in the order in which things happen.
    """

    def on_start(self, record: RunStart) -> None:
        """Called once before the first step."""

    def on_step_begin(self, step: int) -> None:
        """Called before each step, before its micro-batches are read."""

    def on_batches(self, step: int, stage: Stage, batches: Sequence[PatchBatch]) -> None:
        """Called after each step, before `on_step`, with the micro-batches that this rank read."""

    def on_step(self, record: StepRecord) -> None:
        """Called after each step."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Called after each evaluation."""

    def on_switch(self, record: SwitchRecord) -> None:
        """Called after each switch of stages."""

    def on_save(self, record: SaveRecord) -> None:
        """Called after each checkpoint is committed."""

    def on_event(self, event: Event) -> None:
        """Called after something out of the ordinary (see `Event`)."""

    def on_message(self, text: str) -> None:
        """Called with a sentence for the user."""

    def on_end(self, record: RunEnd) -> None:
        """Called at the end of a run that no error ended."""

    def close(self) -> None:
        """Called last, also after an error."""


@dataclass(frozen=True)
class CallbackContext:
    """What a factory of callbacks may use.

    Args:
        run: the options and the plan of the run.
        save: the run's folder (--save), or None.
        grid: coordinates of this rank.
        logits: int64 token ids [B, T], the same on every rank, to logits [B, T, V] at K = 1; every rank must call it equally often.
        tokenizer: the tokenizer of the training data, or None without --sample-prompts.
        device: the device of this rank.
    """

    run: RunConfig
    save: Path | None
    grid: Grid
    logits: Callable[[torch.Tensor], torch.Tensor]
    tokenizer: Tokenizer | None
    device: torch.device


CallbackFactory = Callable[[CallbackContext], Callback]
"""Makes a callback of this rank once the model is built. Every rank calls every factory, in the same order."""
