"""The engine without a pipeline: data parallelism with ZeRO 0 to 3, and tensor parallelism.

In: a model whose forward returns (sum of weighted losses, sum of weights), micro-batches, stages. Out: steps and evaluations.

The boundaries of gradient accumulation are set explicitly: DeepSpeed's own counter runs from the start of the job, so that after a switch
the first step would end too early.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import batch_settings
from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine
from megatron_patch.engine.interface import StepGate, StepResult
from megatron_patch.engine.ranges import named_range
from megatron_patch.engine.stopwatch import Stopwatch
from megatron_patch.parallel.groups import ModelParallelUnit
from megatron_patch.stages import Stage


class DataParallelEngine(DeepSpeedEngine):
    """The engine of a rank that runs all layers, or its tensor-parallel shard of each; see `DeepSpeedEngine` for the arguments."""

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        import deepspeed

        mpu = ModelParallelUnit(self._groups) if self._groups.tensor is not None else None
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)[0]

    def start_stage(self, stage: Stage) -> None:
        """Applies the stage's micro-batch size and gradient accumulation; see `Engine`."""
        settings = batch_settings(stage, self.grid.data_parallel_size)
        self._context = self._groups.context_parallel(stage.context_parallel_size)
        self._balancer.start_stage(stage)
        self._engine.set_train_micro_batch_size(settings["train_micro_batch_size_per_gpu"])
        self._engine.set_train_batch_size(settings["train_batch_size"])

    def _forward(self, batch: PatchBatch, weights: torch.Tensor | None) -> Any:
        """Runs the forward pass of a micro-batch and returns (sum of weighted losses, sum of weights)."""
        inputs, labels, position_ids = map(self._to_device, (batch.input_ids, batch.labels, batch.position_ids))
        # A model of the user's own takes no such arguments: it has neither context parallelism nor balanced experts.
        further: dict[str, Any] = {} if self._context.size == 1 else {"ranks": self._context}
        if batch.padding and self._balancer.states:
            further["real_samples"] = len(batch.input_ids) - batch.padding
        return self._engine(inputs, labels, weights, position_ids, self._documents(batch), **further)

    def train_step(
        self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float, gate: StepGate | None = None
    ) -> StepResult:
        """Runs one optimizer step, unless the gate rejects it; see `Engine`."""
        engine = self._engine
        self._set_lr(lr)
        weights = self._label_weights(label_weights)
        total_weight = self._total_weight(micro_batches, label_weights)
        # The factor undoes DeepSpeed's mean over the data-parallel ranks.
        factor = 1 if self.config.sums_gradients else self.grid.data_parallel_size
        scale = (factor / total_weight).to(torch.float32)
        self._balancer.start_step(factor * (self._loss_scale() or 1.0))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        stopwatch = Stopwatch(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                engine.set_gradient_accumulation_boundary(last)
                with named_range("forward"), stopwatch if index == 0 else contextlib.nullcontext():
                    micro_sum, _ = self._forward(batch, weights)
                loss_sum += micro_sum.detach()
                with named_range("backward"):
                    engine.backward(micro_sum * scale, scale_wrt_gas=False)
                if not last:
                    engine.step()  # counts the micro-batch
            with named_range("optimizer"), self._gated(gate, lambda: self._mean_over_data(loss_sum, total_weight)) as outcome:
                engine.step()  # updates the weights, unless the gate rejects the step
        return self._step_result(outcome, stopwatch.seconds())

    def _mean_over_data(self, loss_sum: torch.Tensor, total_weight: torch.Tensor) -> float:
        """Returns the mean loss over the global batch from this rank's sum, which is overwritten; every rank must call it."""
        self._sum_over_data(loss_sum)
        return float(loss_sum / total_weight)

    def _evaluation_sums(self, batches: Iterable[PatchBatch], corpora: Sequence[int] = ()) -> torch.Tensor:
        sums = torch.zeros(1 + len(corpora), 2, dtype=torch.float64, device=self.device)
        self._engine.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    loss_sum, weight_sum = self._forward(batch, None)
                    of_batch = torch.stack([loss_sum.double(), weight_sum.double()])
                    sums[0] += of_batch
                    if corpora:
                        sums[1 + corpora.index(batch.corpus)] += of_batch
        finally:
            self._engine.train()
        return sums

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits at K = 1; see `Engine`."""
        self._engine.eval()
        try:
            with torch.no_grad():
                # Sequence parallelism needs a multiple of the ranks; attention is causal, so padding at the end changes nothing before it.
                length = ids.shape[1]
                padded = torch.nn.functional.pad(ids, (0, -length % self.grid.tensor_parallel_size))
                result: torch.Tensor = self._engine(padded[..., None], None)
                return result[:, :length]
        finally:
            self._engine.train()
