"""Pipeline parallelism on DeepSpeed's `PipelineModule`: each rank holds some layers, micro-batches follow each other through the stages.

In: this rank's part of the model, micro-batches, stages. Out: steps and evaluations, as without a pipeline.

DeepSpeed's schedule (1F1B) carries one float tensor between stages, the hidden states. Everything else that layers need to know (positions,
documents, labels) each rank takes from its own copy of the micro-batches, in the order in which they pass. Whenever the shape of the hidden
states changes (at a switch between stages whose samples are of constant tokens, or for an evaluation), all ranks drop the buffers of the
old one before the first batch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine, MixedPrecision
from megatron_patch.engine.interface import StepGate, StepResult
from megatron_patch.engine.stopwatch import Stopwatch
from megatron_patch.model.gpt import GPTModel
from megatron_patch.parallel.groups import Groups
from megatron_patch.stages import Stage


@dataclass(frozen=True)
class _Passage:
    """What this rank's layers need of one micro-batch beside the hidden states."""

    position_ids: torch.Tensor | None
    document_ids: torch.Tensor | None
    labels: torch.Tensor | None


class _TiedGradient:
    """A tied weight as DeepSpeed asks for its gradient before it sums it over the stages, wherever that gradient accumulates."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    @property
    def grad(self) -> torch.Tensor | None:
        """The float32 sum beside a float16 weight, else the weight's own gradient."""
        accumulated = getattr(self._weight, "grad_accum", None)
        gradient: torch.Tensor | None = self._weight.grad if accumulated is None else accumulated
        return gradient

    @property
    def _hp_grad(self) -> torch.Tensor | None:
        gradient: torch.Tensor | None = self._weight._hp_grad
        return gradient


class _StageModule(PipelineModule):  # type: ignore[misc]
    """This rank's part of a model, in the form that DeepSpeed's pipeline engine drives.

    Args:
        part: the layers.
        boundaries: of all stages in the list of layers.
        topology: DeepSpeed's view of the grid.
        tied: a weight that the first and the last stage both hold, and their ranks; None elsewhere.
    """

    def __init__(
        self,
        part: nn.Module,
        boundaries: Sequence[int],
        topology: Any,
        tied: tuple[torch.Tensor, torch.distributed.ProcessGroup] | None,
    ) -> None:
        self._given, self._boundaries, self._tied = [part], list(boundaries), tied
        with contextlib.redirect_stdout(io.StringIO()):  # It prints what the plan has told already.
            super().__init__([LayerSpec(nn.Identity)] * boundaries[-1], topology=topology)
        self.is_last = self.stage_id == self.num_stages - 1
        self.passages: Iterator[_Passage] = iter(())
        self.logits: torch.Tensor | None = None
        self.label_weights: torch.Tensor | None = None
        self.scale: torch.Tensor | float = 1.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=next(part.parameters()).device)
        self.stopwatch = self._timed = Stopwatch(self.sums.device)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._boundaries
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self) -> None:
        (self.part,) = self._given
        for parameter in self.part.parameters():
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, Any]]:
        """What DeepSpeed sums over the stages before a step."""
        return [] if self._tied is None else [(_TiedGradient(self._tied[0]), self._tied[1])]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The next micro-batch through the layers: hidden states; in the last stage the scaled loss, or `logits` where no labels are."""
        passage = next(self.passages)
        first, self._timed = self._timed is not self.stopwatch, self.stopwatch
        with self.stopwatch if first else contextlib.nullcontext():
            result = self.part(inputs, passage.labels, self.label_weights, passage.position_ids, passage.document_ids)
        if not self.is_last:
            hidden: torch.Tensor = result
            return hidden
        if isinstance(result, torch.Tensor):
            self.logits = result
            return self.sums.new_zeros(())
        loss_sum, weight_sum = result
        self.sums += torch.stack([loss_sum.detach().double(), weight_sum.double()])
        scaled: torch.Tensor = loss_sum * self.scale
        return scaled


class PipelineParallelEngine(DeepSpeedEngine):
    """One rank of a job whose layers are spread over pipeline stages.

    Args:
        boundaries: of all stages in the list of layers.
        build: as in `DeepSpeedEngine`, with the layers of this rank's stage.
        seed: as there.
        config: as there; ZeRO 0 or 1.
        schedule: as there.
        stage: as there.
        ranks: as there.
        device: as there.
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        build: Callable[[], GPTModel],
        seed: int | None,
        config: EngineConfig,
        schedule: ScheduleOptions,
        stage: Stage,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self._boundaries = boundaries
        self._shape: tuple[int, ...] | None = None
        super().__init__(build, seed, config, schedule, stage, groups, device)

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        grid, part = self.grid, model.module if isinstance(model, MixedPrecision) else model
        assert isinstance(part, GPTModel)
        self._model = part
        topology = PipeModelDataParallelTopology(grid.pipeline_parallel_size, grid.tensor_parallel_size, grid.data_parallel_size)
        tied = None
        if self._model.shape.tie_embeddings and self._model.embedding is not None and self._groups.ends is not None:
            tied = (self._model.embedding.word.weight, self._groups.ends)
        self._module = _StageModule(model, self._boundaries, topology, tied)
        for parameter, name in self._names.items():
            # DeepSpeed counts a parameter with this mark in another stage.
            parameter.ds_pipe_replicated = name in self._copies  # type: ignore[attr-defined]
        # With sequence parallelism each rank's hidden states are its own; else the ranks of a layer share the sending.
        partitioned = not self._model.parallel.sequence
        pipeline = {**settings.get("pipeline", {}), "pipe_partitioned": partitioned, "grad_partitioned": partitioned}
        return deepspeed.initialize(model=self._module, optimizer=optimizer, config={**settings, "pipeline": pipeline})[0]

    def start_stage(self, stage: Stage) -> None:
        """Takes on the stage's micro-batch, accumulation and shapes; see `Engine`."""
        engine, settings = self._engine, batch_settings(stage, self.grid.data_parallel_size)
        engine.set_train_micro_batch_size(settings["train_micro_batch_size_per_gpu"])
        engine.micro_batch_size = settings["train_micro_batch_size_per_gpu"]
        engine.set_train_batch_size(settings["train_batch_size"])
        self._shape = None

    def _feed(
        self, inputs: Sequence[torch.Tensor], passages: Iterable[_Passage], weights: torch.Tensor | None = None, scale: Any = 1.0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Makes the part ready for micro-batches of one shape, [B, T, K], and returns what DeepSpeed reads in the first stage."""
        shape = tuple(inputs[0].shape[:2])
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape
        module = self._module
        module.sums.zero_()
        module.passages, module.label_weights, module.scale = iter(passages), weights, scale
        # Copied here beside the work before it; DeepSpeed's own copy, by way of other memory, would wait for that.
        first, nothing = self._model.is_first, torch.empty(0, device=self.device)
        return ((ids.to(self.device, non_blocking=True) if first else nothing, nothing) for ids in inputs)

    def _passages(self, batches: Iterable[PatchBatch]) -> Iterator[_Passage]:
        moved, last = self._moved, self._model.is_last
        return (_Passage(moved(b.position_ids), moved(b.document_ids), moved(b.labels) if last else None) for b in batches)

    def _summed(self) -> torch.Tensor:
        """[sum of losses, sum of weights] over this replica's samples since the last `_feed`."""
        sums = self._module.sums.clone()
        torch.distributed.all_reduce(sums, group=self._groups.pipeline)
        return sums

    def train_step(
        self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float, gate: StepGate | None = None
    ) -> StepResult:
        """One optimizer step; see `Engine`."""
        self._set_lr(lr)
        total_weight = self._total_weight(micro_batches, label_weights)
        # DeepSpeed divides by the ranks and by the micro-batches.
        scale = (self.grid.data_parallel_size * len(micro_batches) / total_weight).to(torch.float32)
        self._module.stopwatch = Stopwatch(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inputs = [batch.input_ids for batch in micro_batches]
            data = self._feed(inputs, self._passages(micro_batches), self._weights(label_weights), scale)
            with self._gated(gate, lambda: self._global_loss(total_weight)) as outcome:
                self._engine.train_batch(data)  # forward, backward, and the update unless the gate rejects the step
        return self._step_result(outcome, self._module.stopwatch.seconds())

    def _global_loss(self, total_weight: torch.Tensor) -> float:
        """Returns the mean loss over the global batch; every rank must call it."""
        sums = self._summed()
        self._sum_over_data(sums)
        return float(sums[0] / total_weight)

    def _local_sums(self, batches: Iterable[PatchBatch]) -> torch.Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _, group in itertools.groupby(batches, key=lambda batch: batch.input_ids.shape[:2]):
            alike = list(group)
            self._forward([batch.input_ids for batch in alike], self._passages(alike))
            sums += self._summed()
        return sums

    def _forward(self, inputs: Sequence[torch.Tensor], passages: Iterable[_Passage]) -> None:
        """Forward passes alone."""
        data = self._feed(inputs, passages)
        try:
            self._engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=len(inputs))
        finally:
            self._engine.module.train()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Distributions at K = 1; see `Engine`."""
        length = ids.shape[1]
        padded = torch.nn.functional.pad(ids, (0, -length % self.grid.tensor_parallel_size))
        self._forward([padded[..., None]], [_Passage(None, None, None)])
        found, self._module.logits = self._module.logits, None
        if found is None:
            result = torch.empty(*padded.shape, self._model_shape.vocab_size, device=self.device)
        else:
            result = found.float().contiguous()
        torch.distributed.broadcast(result, group=self._groups.pipeline, group_src=self.grid.pipeline_parallel_size - 1)
        return result[:, :length]
