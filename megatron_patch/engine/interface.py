"""What the training loop asks of an engine, whichever parallel layout is behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.data.collate import PatchBatch
from megatron_patch.stages import Stage


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Args:
        loss: mean over all scored labels of the global batch, in nats.
        grad_norm: norm of the mean gradient before clipping.
        skipped: whether the optimizer did not step.
        refused: why not, where that was no float16 overflow.
        loss_scale: the loss scale in float16, else None.
        forward_seconds: this rank's first forward pass.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    rejection: str | None = None
    loss_scale: float | None = None
    forward_seconds: float = 0.0


class StepGate(Protocol):
    """Decides whether a step is taken, from numbers that every rank has alike."""

    def check_loss(self, loss: float) -> str | None:
        """Why not, by the loss."""
        ...

    def check_grad_norm(self, norm: float) -> str | None:
        """Why not, by the gradient's norm."""
        ...


@dataclass(frozen=True)
class EvaluationResult:
    """A mean over held-out labels.

    Args:
        loss: in nats a label.
        labels: scored labels over all ranks.
    """

    loss: float
    labels: int


@dataclass(frozen=True)
class ReplicaMismatch:
    """A rank whose copy of a parameter differs from the copy of another rank.

    Args:
        parameter: name of the parameter.
        rank: the rank whose copy differs.
        reference_rank: the lowest rank that holds the parameter, which it was compared with.
    """

    parameter: str
    rank: int
    reference_rank: int


@dataclass(frozen=True)
class Snapshot:
    """What one rank puts into a checkpoint.

    Args:
        state: what the trainer's state must keep for `Engine.load`.
        write: writes this rank's files into a folder, durably, and tells what the manifest says of them.
    """

    state: Mapping[str, Any]
    write: Callable[[Path], dict[str, ManifestEntry]]


class Engine(Protocol):
    """Trains, evaluates, switches stages, saves and loads."""

    def train_step(
        self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float, gate: StepGate | None = None
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches of a global batch, unless the judge has something against it."""
        ...

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T], the same on every rank, to one distribution a position, [B, T, V]; every rank must call it."""
        ...

    def evaluate(self, batches: Iterable[PatchBatch]) -> EvaluationResult:
        """The mean loss over batches; every rank brings the same number of them."""
        ...

    def local_loss(self, batch: PatchBatch) -> float:
        """The sum of the losses of one batch over the ranks that share a model, each of which must call it; of no others."""
        ...

    def switch_stage(self, stage: Stage) -> None:
        """Takes on the stage's micro-batch, accumulation and shapes, and treats the optimizer as the stage asks."""
        ...

    def start_stage(self, stage: Stage) -> None:
        """Takes on a stage's batch and shapes and leaves the optimizer alone: at the start and when resuming inside a stage."""
        ...

    def replica_mismatches(self) -> list[ReplicaMismatch]:
        """Returns the copies of parameters that differ between ranks that must hold the same bits; every rank must call it."""
        ...

    def snapshot(self, to_host: bool) -> Snapshot:
        """This rank's part of a checkpoint; with `to_host` a copy that later steps leave alone, valid until the next call."""
        ...

    def load(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Reads weights, and with `state` (a snapshot's) the optimizer too, written under any layout."""
        ...
