"""The interface between the training loop and an engine, the same for every parallel layout.

In: micro-batches, stages, checkpoint folders. Out: `StepResult`, `EvaluationResult`, `Snapshot` and `ReplicaMismatch`, plain records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.data.collate import PatchBatch
from megatron_patch.stages import Stage


@dataclass(frozen=True)
class ExpertLoad:
    """The load of a block's experts in one step, over the global batch.

    Args:
        block: number of the block, from 0.
        largest: choices of the expert that most positions chose, relative to the mean of the experts; 1 is perfect balance.
        dead: number of experts that no position chose.
        entropy: mean over positions of the entropy of the router's scores divided by their sum, in nats; at most log E.
    """

    block: int
    largest: float
    dead: int
    entropy: float


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Args:
        loss: mean over all scored labels of the global batch, in nats.
        grad_norm: norm of the mean gradient before clipping.
        skipped: whether the weights were left unchanged.
        rejection: reason why the step was rejected; None if it was taken, or skipped only because of an overflow in float16.
        loss_scale: the loss scale in float16, else None.
        forward_seconds: duration of this rank's first forward pass.
        experts: the load of each block with experts, in order.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    rejection: str | None = None
    loss_scale: float | None = None
    forward_seconds: float = 0.0
    experts: tuple[ExpertLoad, ...] = ()


class StepGate(Protocol):
    """Decides whether a step may change the weights, from numbers that are the same on every rank."""

    def check_loss(self, loss: float) -> str | None:
        """Returns the reason to reject the step by its mean loss, or None."""
        ...

    def check_grad_norm(self, norm: float) -> str | None:
        """Returns the reason to reject the step by its gradient norm (before clipping), or None."""
        ...


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation on held-out data.

    Args:
        loss: mean over the scored labels, in nats.
        labels: number of scored labels over all ranks.
        corpora: the same for each corpus, by its number (`PatchBatch.corpus`); empty in these results themselves.
    """

    loss: float
    labels: int
    corpora: Mapping[int, EvaluationResult] = field(default_factory=dict)


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
    """One rank's part of a checkpoint.

    Args:
        state: the engine's state, which the trainer state must keep for `Engine.load`.
        write: writes this rank's files into a folder, durably, and returns their manifest entries by file name.
    """

    state: Mapping[str, Any]
    write: Callable[[Path], dict[str, ManifestEntry]]


class Engine(Protocol):
    """One rank's engine: it trains, evaluates, switches stages, saves and loads.

    All methods except `local_loss` are collective: every rank must call them, in the same order.
    """

    def train_step(
        self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float, gate: StepGate | None = None
    ) -> StepResult:
        """Runs forward and backward over a global batch and steps the optimizer, unless the gate rejects the step.

        Args:
            micro_batches: this rank's micro-batches of the global batch.
            label_weights: weight of each of the K labels of a position.
            lr: learning rate of the step.
            gate: may reject the step by its loss or gradient norm; None: every step is taken.
        """
        ...

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the next token at each position, at K = 1.

        Args:
            ids: token ids, int64 [B, T], the same on every rank.

        Returns:
            [B, T, V], the same on every rank.
        """
        ...

    def evaluate(self, batches: Iterable[PatchBatch]) -> EvaluationResult:
        """Returns the mean loss over held-out batches, and that of each corpus.

        Args:
            batches: this rank's batches; every rank must pass the same number of them, of the same corpora in the same order.
        """
        ...

    def local_loss(self, batch: PatchBatch) -> float:
        """Returns the loss sum of one batch on this replica only; all ranks of the replica must call it with the same batch.

        Replicas that share the positions of samples call it together, and each returns the sum over all of them.
        """
        ...

    def switch_stage(self, stage: Stage) -> None:
        """Switches to a stage: as `start_stage`, and keeps or resets the optimizer's state according to `Stage.optimizer`."""
        ...

    def start_stage(self, stage: Stage) -> None:
        """Applies a stage's batch sizes and shapes without changing the optimizer: at the start of a run and on resume."""
        ...

    def replica_mismatches(self) -> list[ReplicaMismatch]:
        """Returns the copies of parameters that differ between ranks that must hold the same bits; every rank must call it."""
        ...

    def snapshot(self, to_host: bool) -> Snapshot:
        """Returns this rank's part of a checkpoint.

        Args:
            to_host: copy all tensors to host memory, so that training can continue while the snapshot is written; the copy is valid
                until the next call.
        """
        ...

    def close(self) -> None:
        """Removes what the engine registered in torch, so that its memory is freed with it; called last."""
        ...

    def load(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Loads a checkpoint, which may have been written under any parallel layout.

        Args:
            folder: the checkpoint's folder.
            state: `Snapshot.state` of the checkpoint; None: load only the weights and keep a fresh optimizer.

        Raises:
            CheckpointError: a file is damaged, or the checkpoint belongs to another model.
        """
        ...
