"""What happens in a run, as records, and who may listen.

In: nothing. Out: the records that the loop makes and the methods that a listener may have. The names of a record's fields are the names
in metrics files, TensorBoard and Weights & Biases. `token_loss` is a loss at K = 1, `patch_loss` one at the stage's own K: a patch loss
is no token loss, and the two are never called the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """The run begins or goes on.

    Args:
        step: steps taken so far.
        total_steps: of the whole run.
        total_tokens: of the whole run.
        switches: (tokens at which a stage begins, its name) for each stage but the first.
        tokens: read so far.
        device: name of the devices.
        ranks: number of processes.
        save: the run's folder.
        token_flops: FLOPs of one token at token level.
        whole_cost: FLOPs of the run over those of token-level training on the same tokens.
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
"""What a step record says of its step beside losses, tokens and cost: the names that files, charts and reports share."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: its number, from 1.
        stage: name of its stage.
        stage_index: its number.
        patch_size: K.
        tokens: read so far.
        cost_tokens: tokens that token-level training would have read for the FLOPs so far.
        cost: FLOPs so far over those of token-level training on the tokens so far.
        loss: nats a label, at the stage's K.
        lr: learning rate.
        grad_norm: before clipping.
        tokens_per_second: of all ranks.
        positions_per_second: of all ranks.
        tflops: model TFLOP/s of a device.
        mfu: of a device's peak, or None.
        memory_gib: highest of this rank so far.
        data_seconds: spent waiting for data in this step.
        step_seconds: of this step.
        loss_scale: in float16.
        skipped: whether the optimizer did not step (a sick step, or float16 overflow).
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


@dataclass(frozen=True)
class EvaluationRecord:
    """A held-out evaluation.

    Args:
        step: steps taken.
        stage: name of the stage.
        stage_index: its number.
        patch_size: K of the stage.
        tokens: read so far.
        cost_tokens: as in `StepRecord`.
        split: which data.
        token_loss: nats a token at K = 1.
        patch_loss: nats a label at the stage's K.
        eval_tokens: scored tokens.
        seconds: it took.
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


@dataclass(frozen=True)
class SwitchRecord:
    """One stage became the next."""

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
        step: that it holds; with --async-save some steps ago.
        folder: where it is.
        seconds: from its beginning until it was published.
        bytes: of its files.
        stall_seconds: for which training waited, for the snapshot alone with --async-save.
    """

    step: int
    folder: str
    seconds: float
    bytes: int
    stall_seconds: float


@dataclass(frozen=True)
class Event:
    """Something that does not happen in every run.

    Args:
        kind: "skip", "rewind", "straggler", …
        step: steps taken.
        message: a sentence for the user.
        details: for scripts, plain JSON values.
    """

    kind: str
    step: int
    message: str
    details: dict[str, Any]


@dataclass(frozen=True)
class RunEnd:
    """The run stops. `reason` is "done", "exit interval", or who asked for it; `code` is the exit code."""

    reason: str
    step: int
    tokens: int
    seconds: float
    code: int = 0


class Callback:
    """A listener; every method does nothing unless it is replaced."""

    def on_start(self, record: RunStart) -> None:
        """Before the first step."""

    def on_batches(self, step: int, stage: Stage, batches: Sequence[PatchBatch]) -> None:
        """After a step, with what this rank read in it."""

    def on_step(self, record: StepRecord) -> None:
        """After each step."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """After an evaluation."""

    def on_switch(self, record: SwitchRecord) -> None:
        """After a switch of stages."""

    def on_save(self, record: SaveRecord) -> None:
        """After a checkpoint is committed."""

    def on_event(self, event: Event) -> None:
        """Something out of the ordinary."""

    def on_message(self, text: str) -> None:
        """A sentence for the user."""

    def on_end(self, record: RunEnd) -> None:
        """When the run stops by itself."""

    def close(self) -> None:
        """Always last, also after an error."""


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
