"""The engine with a pipeline, on DeepSpeed's `PipelineModule`: each pipeline rank holds some of the layers.

In: this rank's part of the model, micro-batches, stages. Out: steps and evaluations, with the results of the engine without a pipeline.

DeepSpeed's schedule (1F1B) sends one float tensor between pipeline ranks: the hidden states. Everything else that the layers need
(positions, documents, labels) each rank takes from its own copy of the micro-batches, in the order in which they pass. When the shape of
the hidden states changes (at a switch between stages whose samples have a constant number of tokens, or for an evaluation), all ranks drop
the buffers of the old shape before the first micro-batch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine, ModelSource
from megatron_patch.engine.interface import StepGate, StepResult
from megatron_patch.engine.mixed_precision import MixedPrecision
from megatron_patch.engine.ranges import named_instructions
from megatron_patch.engine.stopwatch import Stopwatch
from megatron_patch.model.gpt import GPTModel
from megatron_patch.ops.documents_attention import Documents
from megatron_patch.parallel.context import UNSHARED, ContextParallel
from megatron_patch.parallel.groups import Groups
from megatron_patch.stages import Stage


def _sum_norms_equally_often(zero: Any) -> None:
    """Makes all pipeline ranks take part in as many sums for the gradient norm; they must call this together.

    DeepSpeed's ZeRO 1 sums the squares of each parameter group by itself over all pipeline ranks. A rank without blocks or without word
    embeddings has fewer groups than others, which would wait for it. It adds zeros to their further sums. All ranks combine the same sums
    in the same order, so that their norms, and what is clipped by them, are equal to the last bit.

    Args:
        zero: DeepSpeed's optimizer; one that sums all groups at once stays as it is.
    """
    if not hasattr(zero, "scaled_global_norm"):
        return
    own, ranks = len(zero.bit16_groups), zero.model_parallel_group
    counts = [0] * torch.distributed.get_world_size(ranks)
    torch.distributed.all_gather_object(counts, own, group=ranks)
    if len(set(counts)) == 1:
        return

    def norm_of(group: int) -> Any:
        params = zero.params_in_partition[group] if group < own else []
        if zero.cpu_offload:
            return zero.complete_grad_norm_calculation_for_cpu_offload(params)
        return zero.get_grad_norm_direct(zero.averaged_gradients[group] if group < own else [], params)

    zero.scaled_global_norm = lambda norm_type=2: combine_grad_norm_groups([norm_of(group) for group in range(max(counts))], norm_type)


@dataclass(frozen=True)
class _ExtraInputs:
    """What this rank's layers need of one micro-batch in addition to the hidden states.

    Args:
        position_ids: see `PatchBatch`.
        documents: see `PatchBatch`; on this rank's device.
        labels: see `PatchBatch`; None on pipeline ranks before the last, and when logits are computed.
        row: row of the sums to which the micro-batch counts in addition to the first; None: only the first.
        ranks: the ranks that share the positions of its samples.
        real_samples: number of its samples, the first ones, that are no padding; None: all.
    """

    position_ids: torch.Tensor | None
    documents: Documents | None
    labels: torch.Tensor | None
    row: int | None = None
    ranks: ContextParallel = UNSHARED
    real_samples: int | None = None


class _TiedGradient:
    """A tied weight with the interface through which DeepSpeed sums its gradient over the pipeline ranks.

    Args:
        weight: the parameter, whose gradient may accumulate in one of several attributes.
    """

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    @property
    def grad(self) -> torch.Tensor | None:
        """The float32 accumulator of a weight of lower precision if there is one, else the weight's own gradient."""
        accumulated = getattr(self._weight, "grad_accum", None)
        gradient: torch.Tensor | None = self._weight.grad if accumulated is None else accumulated
        return gradient

    @property
    def _hp_grad(self) -> torch.Tensor | None:
        gradient: torch.Tensor | None = self._weight._hp_grad
        return gradient


class _PipelineRankModule(PipelineModule):  # type: ignore[misc]
    """This pipeline rank's part of a model, in the form that DeepSpeed's pipeline engine runs.

    Args:
        part: this rank's layers.
        boundaries: first layer of each pipeline rank, and the number of layers.
        topology: DeepSpeed's view of the grid.
        tied: the embedding that the first and the last pipeline rank both hold, with their process group; None on other ranks.
    """

    def __init__(
        self,
        part: nn.Module,
        boundaries: Sequence[int],
        topology: Any,
        tied: tuple[torch.Tensor, torch.distributed.ProcessGroup] | None,
    ) -> None:
        # In a list, so that torch does not register the module before `_build`.
        self._unbuilt, self._boundaries, self._tied = [part], list(boundaries), tied
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the partition, which the plan has shown already.
            super().__init__([LayerSpec(nn.Identity)] * boundaries[-1], topology=topology)
        self.is_last = self.stage_id == self.num_stages - 1
        self.extra_inputs: Iterator[_ExtraInputs] = iter(())
        self.logits: torch.Tensor | None = None
        self.label_weights: torch.Tensor | None = None
        self.scale: torch.Tensor | float = 1.0
        self.sums = torch.zeros(1, 2, dtype=torch.float64, device=next(part.parameters()).device)
        self.stopwatch = self._timed = Stopwatch(self.sums.device)

    def _partition_layers(self, method: str = "") -> None:
        """Replaces DeepSpeed's partition by the given boundaries."""
        self.parts = self._boundaries
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self) -> None:
        """Registers the given layers, where DeepSpeed would build its own."""
        (self.part,) = self._unbuilt
        for parameter in self.part.parameters():
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, Any]]:
        """Returns the weights whose gradients DeepSpeed sums over pipeline ranks before a step, each with its process group."""
        return [] if self._tied is None else [(_TiedGradient(self._tied[0]), self._tied[1])]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Runs the next micro-batch through this rank's layers.

        Args:
            inputs: token ids on the first pipeline rank, else hidden states.

        Returns:
            Hidden states; on the last pipeline rank the scaled loss, or without labels a zero, and the logits are put into `logits`.
        """
        extra = next(self.extra_inputs)
        first, self._timed = self._timed is not self.stopwatch, self.stopwatch
        with self.stopwatch if first else contextlib.nullcontext():
            arguments = (extra.labels, self.label_weights, extra.position_ids, extra.documents, extra.ranks, extra.real_samples)
            result = self.part(inputs, *arguments)
        if not self.is_last:
            hidden: torch.Tensor = result
            return hidden
        if isinstance(result, torch.Tensor):
            self.logits = result
            return self.sums.new_zeros(())
        loss_sum, weight_sum = result
        of_batch = torch.stack([loss_sum.detach().double(), weight_sum.double()])
        self.sums[0] += of_batch
        if extra.row is not None:
            self.sums[extra.row] += of_batch
        scaled: torch.Tensor = loss_sum * self.scale
        return scaled


class PipelineParallelEngine(DeepSpeedEngine):
    """The engine of a rank that holds some of the layers, over a pipeline of ranks.

    Args:
        boundaries: first layer of each pipeline rank, and the number of layers.
        source: builds the layers of this pipeline rank; see `DeepSpeedEngine`.
        config: see `DeepSpeedEngine`; ZeRO 0 or 1.
        schedule: see `DeepSpeedEngine`.
        stage: see `DeepSpeedEngine`.
        groups: see `DeepSpeedEngine`.
        device: see `DeepSpeedEngine`.
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        source: ModelSource,
        config: EngineConfig,
        schedule: ScheduleOptions,
        stage: Stage,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self._boundaries = boundaries
        self._shape: tuple[int, ...] | None = None
        super().__init__(source, config, schedule, stage, groups, device)

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        grid, part = self.grid, model.module if isinstance(model, MixedPrecision) else model
        assert isinstance(part, GPTModel)
        self._model = part
        topology = PipeModelDataParallelTopology(grid.pipeline_parallel_size, grid.tensor_parallel_size, grid.data_parallel_size)
        tied = None
        if self._model.shape.tie_embeddings and self._model.embedding is not None and self._groups.embedding is not None:
            tied = (self._model.embedding.word.weight, self._groups.embedding)
        self._module = _PipelineRankModule(model, self._boundaries, topology, tied)
        for parameter, name in self._names.items():
            # In the gradient norm, DeepSpeed counts a parameter with this mark on another pipeline rank only.
            parameter.ds_pipe_replicated = name in self._tied_copies  # type: ignore[attr-defined]
        # Without sequence parallelism all tensor-parallel ranks hold the same hidden states, and each sends a part of them.
        partitioned = not self._model.parallel.sequence
        pipeline = {"pipe_partitioned": partitioned, "grad_partitioned": partitioned}
        engine = deepspeed.initialize(model=self._module, optimizer=optimizer, config={**settings, "pipeline": pipeline})[0]
        engine._INSTRUCTION_MAP = named_instructions(engine._INSTRUCTION_MAP)
        _sum_norms_equally_often(engine.optimizer)
        return engine

    def start_stage(self, stage: Stage) -> None:
        """Applies the stage's micro-batch size, gradient accumulation and shapes; see `Engine`."""
        engine, settings = self._engine, batch_settings(stage, self.grid.data_parallel_size)
        self._balancer.start_stage(stage)
        engine.set_train_micro_batch_size(settings["train_micro_batch_size_per_gpu"])
        engine.micro_batch_size = settings["train_micro_batch_size_per_gpu"]
        engine.set_train_batch_size(settings["train_batch_size"])
        self._context = self._groups.context_parallel(stage.context_parallel_size)
        self._shape = None

    def _feed(
        self,
        inputs: Sequence[torch.Tensor],
        extra_inputs: Iterable[_ExtraInputs],
        weights: torch.Tensor | None = None,
        scale: Any = 1.0,
        rows: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Prepares this rank's layers for micro-batches of one shape and returns the iterator from which DeepSpeed reads them.

        Args:
            inputs: token ids of each micro-batch, [B, T, K].
            extra_inputs: the other tensors of each micro-batch.
            weights: label weights [K]; None: all 1.
            scale: factor of the loss.
            rows: number of rows of the sums; the first is over all micro-batches.

        Returns:
            Yields (token ids, empty tensor) for each micro-batch; ranks other than the first pipeline rank need no token ids.
        """
        shape = tuple(inputs[0].shape[:2])
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape
        module = self._module
        module.sums = module.sums.new_zeros(rows, 2)
        module.extra_inputs, module.label_weights, module.scale = iter(extra_inputs), weights, scale
        # Copied here, while the device still computes; DeepSpeed would copy through a buffer and wait for the device.
        first, empty = self._model.is_first, torch.empty(0, device=self.device)
        return ((ids.to(self.device, non_blocking=True) if first else empty, empty) for ids in inputs)

    def _extra_inputs(self, batches: Iterable[PatchBatch], corpora: Sequence[int] = ()) -> Iterator[_ExtraInputs]:
        """Yields what this rank's layers need of each micro-batch, on the device; each of the corpora has a row of the sums."""
        to_device, last = self._to_device, self._model.is_last
        for batch in batches:
            row = 1 + corpora.index(batch.corpus) if corpora else None
            labels = to_device(batch.labels) if last else None
            real = len(batch.input_ids) - batch.padding if batch.padding else None
            yield _ExtraInputs(to_device(batch.position_ids), self._documents(batch), labels, row, self._context, real)

    def _replica_sums(self) -> torch.Tensor:
        """Returns [sum of losses, sum of weights] over this replica's samples since the last `_feed`, float64 [rows, 2]."""
        sums = self._module.sums.clone()
        torch.distributed.all_reduce(sums, group=self._groups.pipeline)
        return sums

    def train_step(
        self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float, gate: StepGate | None = None
    ) -> StepResult:
        """Runs one optimizer step, unless the gate rejects it; see `Engine`."""
        self._set_lr(lr)
        total_weight = self._total_weight(micro_batches, label_weights)
        # The factor undoes DeepSpeed's division by the number of data-parallel ranks and of micro-batches.
        scale = (self.grid.data_parallel_size * len(micro_batches) / total_weight).to(torch.float32)
        # DeepSpeed divides the loss by the number of micro-batches before the gradient reaches any layer.
        self._balancer.start_step(self.grid.data_parallel_size * (self._loss_scale() or 1.0))
        self._module.stopwatch = Stopwatch(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inputs = [batch.input_ids for batch in micro_batches]
            data = self._feed(inputs, self._extra_inputs(micro_batches), self._label_weights(label_weights), scale)
            with self._gated(gate, lambda: self._global_loss(total_weight)) as outcome:
                self._engine.train_batch(data)  # forward, backward, and the update unless the gate rejects the step
        return self._step_result(outcome, self._module.stopwatch.seconds())

    def _global_loss(self, total_weight: torch.Tensor) -> float:
        """Returns the mean loss over the global batch; every rank must call it."""
        sums = self._replica_sums()
        self._sum_over_data(sums)
        return float(sums[0, 0] / total_weight)

    def _evaluation_sums(self, batches: Iterable[PatchBatch], corpora: Sequence[int] = ()) -> torch.Tensor:
        sums = torch.zeros(1 + len(corpora), 2, dtype=torch.float64, device=self.device)
        for _, group in itertools.groupby(batches, key=lambda batch: batch.input_ids.shape[:2]):
            same_shape = list(group)
            self._forward([batch.input_ids for batch in same_shape], self._extra_inputs(same_shape, corpora), rows=len(sums))
            sums += self._replica_sums()
        return sums

    def _forward(self, inputs: Sequence[torch.Tensor], extra_inputs: Iterable[_ExtraInputs], rows: int = 1) -> None:
        """Runs the forward passes of micro-batches of one shape, without gradients; `rows` as in `_feed`."""
        data = self._feed(inputs, extra_inputs, rows=rows)
        try:
            self._engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=len(inputs))
        finally:
            self._engine.module.train()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits at K = 1; see `Engine`."""
        length = ids.shape[1]
        padded = torch.nn.functional.pad(ids, (0, -length % self.grid.tensor_parallel_size))
        self._forward([padded[..., None]], [_ExtraInputs(None, None, None)])
        logits, self._module.logits = self._module.logits, None  # None except on the last pipeline rank
        if logits is None:
            result = torch.empty(*padded.shape, self._model_shape.vocab_size, device=self.device)
        else:
            result = logits.float().contiguous()
        torch.distributed.broadcast(result, group=self._groups.pipeline, group_src=self.grid.pipeline_parallel_size - 1)
        return result[:, :length]
