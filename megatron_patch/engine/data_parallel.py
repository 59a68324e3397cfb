"""Data parallelism with ZeRO 0 to 3, over layers that ranks may share: the engine without a pipeline, on `deepspeed.initialize`.

In: a model whose forward returns (sum of weighted losses, sum of weights), micro-batches, stages. Out: steps, evaluations, checkpoints.

The loss is normalised over the labels of the **global** batch, counted before the forward pass, so neither masked labels nor the number
of ranks nor the size of a micro-batch changes what is learnt: each micro-batch contributes sum / N, and DeepSpeed's mean over ranks is
undone by their number. Accumulation boundaries are set explicitly, as DeepSpeed's own counter runs on from the start of the job and
would cut the first step after a switch short.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.data.patch_dataset import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.engine.distributed import barrier, gather_objects
from megatron_patch.engine.fragments import fragments
from megatron_patch.engine.interface import EvaluationResult, StepResult
from megatron_patch.engine.optimizer import base_optimizer, make_optimizer, set_step_count, step_count, zero_moments
from megatron_patch.engine.state_files import StateFiles, write_fragments
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.parallel.groups import Groups, ModelParallelUnit
from megatron_patch.parallel.sharding import Shard
from megatron_patch.stages import Stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MixedPrecision(nn.Module):
    """Runs a float32 module with its weights rounded to a lower precision in each forward pass.

    ZeRO 0 in DeepSpeed keeps no float32 master weights beside bfloat16 ones and would accumulate gradients in bfloat16; with this
    wrapper the weights stay float32, and so do their gradients.

    Args:
        module: float32 parameters.
        dtype: of the rounded weights.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with rounded weights."""
        rounded = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, rounded, args, kwargs, tie_weights=True)


class DataParallelEngine:
    """One rank of a data-parallel job.

    Args:
        model: float32, on the CPU or the device; its parameters are the initial weights.
        groups: the optimizer's parameter groups: (parameters with weight decay, parameters without).
        shards: the parts that this rank holds of the parameters that are cut.
        config: precision, ZeRO stage, DeepSpeed's JSON.
        schedule: the optimizer's settings.
        stage: the first stage.
        ranks: this rank's place and process groups.
        device: this rank's device.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]],
        shards: Mapping[str, Shard],
        config: EngineConfig,
        schedule: ScheduleOptions,
        stage: Stage,
        ranks: Groups,
        device: torch.device,
    ) -> None:
        import deepspeed

        self.config, self.device = config, device
        self.grid, self._ranks, self._shards = ranks.grid, ranks, dict(shards)
        dtype = DTYPES[config.precision]
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, name in self._names.items():
            # DeepSpeed counts a parameter without this mark once over the ranks that share a layer.
            parameter.tensor_model_parallel = name in self._shards  # type: ignore[attr-defined]
        settings = dict(config.deepspeed)
        wrapped: nn.Module = model
        initial: dict[str, torch.Tensor] = {}
        if config.zero_stage == 0:
            # Its clipping would not tell the norm.
            settings["gradient_clipping"] = 0.0
            wrapped = MixedPrecision(model, dtype) if dtype != torch.float32 else model
        elif dtype != torch.float32:
            # Master weights must start from the float32 initial weights, not from their rounded copies.
            initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            model.to(dtype)
        decayed, undecayed = groups
        parameter_groups = [
            {"params": list(decayed), "weight_decay": schedule.weight_decay},
            {"params": list(undecayed), "weight_decay": 0.0},
        ]
        optimizer = make_optimizer([group for group in parameter_groups if group["params"]], schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._engine, *_ = deepspeed.initialize(
                model=wrapped,
                optimizer=optimizer,
                config={**settings, **batch_settings(stage, self.grid.data_parallel_size)},
                mpu=ModelParallelUnit(ranks) if ranks.tensor is not None else None,
            )
        self._base = base_optimizer(self._engine.optimizer)
        if initial:
            self._fill(lambda kind, name, start, numel: initial[name].view(-1)[start : start + numel], ("weight",))
        self.start_stage(stage)

    def start_stage(self, stage: Stage) -> None:
        """Takes on the stage's micro-batch and accumulation; see `Engine`."""
        settings = batch_settings(stage, self.grid.data_parallel_size)
        self._engine.set_train_micro_batch_size(settings["train_micro_batch_size_per_gpu"])
        self._engine.set_train_batch_size(settings["train_batch_size"])

    def switch_stage(self, stage: Stage) -> None:
        """Takes on the stage and resets or keeps the optimizer; see `Engine`."""
        self.start_stage(stage)
        if stage.optimizer == "keep":
            return
        if self.config.offloads_to_nvme:
            raise ConfigError(
                f"stage {stage.name!r} resets an optimizer that is offloaded to NVMe",
                "optimizer: keep",
                "offload it to the CPU, or keep it",
            )
        zero_moments(self._base.state.values())
        if stage.optimizer == "reset":
            set_step_count(self._base, 0)

    def _to_device(self, batch: PatchBatch) -> tuple[torch.Tensor | None, ...]:
        moved = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
        return tuple(None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in moved)

    def _weights(self, label_weights: Sequence[float]) -> torch.Tensor | None:
        """The label weights as a tensor, or None where all are 1."""
        if all(weight == 1.0 for weight in label_weights):
            return None
        return torch.tensor(label_weights, dtype=torch.float32, device=self.device)

    def _total_weight(self, batches: Sequence[PatchBatch], label_weights: Sequence[float]) -> torch.Tensor:
        """Sum of the weights of all scored labels over all ranks, float64 on the device."""
        weights = torch.tensor(label_weights, dtype=torch.float64)
        total = sum(
            (((batch.labels != IGNORE_INDEX).sum(dim=(0, 1)) * weights).sum() for batch in batches), torch.zeros((), dtype=torch.float64)
        )
        total = total.to(self.device)
        self._all_reduce(total)
        return total

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums over the ranks that see other samples."""
        if self.grid.data_parallel_size > 1:
            torch.distributed.all_reduce(tensor, group=self._ranks.data)

    def train_step(self, micro_batches: Sequence[PatchBatch], label_weights: Sequence[float], lr: float) -> StepResult:
        """One optimizer step; see `Engine`."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        weights = self._weights(label_weights)
        total = self._total_weight(micro_batches, label_weights).clamp(min=1e-30)
        scale = (self.grid.data_parallel_size / total).to(torch.float32)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        skipped_before = engine.skipped_steps
        grad_norm: Any = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                engine.set_gradient_accumulation_boundary(last)
                input_ids, labels, position_ids, document_ids = self._to_device(batch)
                micro_sum, _ = engine(input_ids, labels, weights, position_ids, document_ids)
                loss_sum += micro_sum.detach()
                engine.backward(micro_sum * scale, scale_wrt_gas=False)
                if last and self.config.zero_stage == 0:
                    grad_norm = self._clip_gradients(self.config.clip_grad or float("inf"))
                engine.step()
        self._all_reduce(loss_sum)
        if self.config.zero_stage > 0:
            grad_norm = engine.get_global_grad_norm()
        return StepResult(
            loss=float(loss_sum / total),
            grad_norm=float("nan") if grad_norm is None else float(grad_norm),
            skipped=engine.skipped_steps > skipped_before,
            loss_scale=float(engine.optimizer.loss_scale) if self.config.precision == "fp16" else None,
        )

    def _clip_gradients(self, limit: float) -> torch.Tensor:
        """Scales all gradients so that their norm over the whole model is at most the limit; returns the norm before."""
        gradients = {name: parameter.grad for parameter, name in self._names.items() if parameter.grad is not None}
        own = torch.nn.utils.get_total_norm([gradients[name] for name in gradients if name in self._shards]).double().square()
        shared = torch.nn.utils.get_total_norm([gradients[name] for name in gradients if name not in self._shards])
        if self._ranks.tensor is not None:
            own = own.to(shared.device)
            torch.distributed.all_reduce(own, group=self._ranks.tensor)
        norm = (own + shared.double().square()).sqrt().to(shared.dtype) if self._shards else shared
        torch.nn.utils.clip_grads_with_norm_(list(self._names), limit, norm)
        return norm

    def evaluate(self, batches: Iterable[PatchBatch]) -> EvaluationResult:
        """Mean held-out loss; see `Engine`."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._engine.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    input_ids, labels, position_ids, document_ids = self._to_device(batch)
                    loss_sum, weight_sum = self._engine(input_ids, labels, None, position_ids, document_ids)
                    sums += torch.stack([loss_sum.double(), weight_sum.double()])
        finally:
            self._engine.train()
        self._all_reduce(sums)
        loss_sum, labels_scored = sums.tolist()
        return EvaluationResult(loss_sum / labels_scored if labels_scored else float("nan"), int(labels_scored))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Distributions at K = 1; see `Engine`."""
        self._engine.eval()
        try:
            with torch.no_grad():
                # With sequence parallelism positions are shared out evenly; what is behind a position does not change it.
                length = ids.shape[1]
                padded = torch.nn.functional.pad(ids, (0, -length % self.grid.tensor_parallel_size))
                result: torch.Tensor = self._engine(padded[..., None], None)
                return result[:, :length]
        finally:
            self._engine.train()

    def save(self, folder: Path) -> Mapping[str, Any]:
        """Writes this rank's fragments; see `Engine`.

        Raises:
            CheckpointError: on every rank, where any rank could not write.
        """
        share = (self.grid.data_parallel_rank, self.grid.data_parallel_size)
        # What all ranks of a layer hold is written by the first of them.
        first = self.grid.tensor_parallel_rank == 0
        failure: str | None = None
        try:
            mine = [f for f in fragments(self._engine, self._names, self._shards, share) if first or f.shard is not None]
            write_fragments(folder, self.grid.rank, self.grid.world_size, mine)
        except CheckpointError as error:
            failure = str(error)
        failures = [str(text) for text in gather_objects(failure) if text]
        if failures:
            raise CheckpointError(failures[0], do="free space or change --save; the earlier checkpoints are untouched")
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        scaler_state = {
            key: getattr(scaler, key)
            for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            if self.config.precision == "fp16" and hasattr(scaler, key)
        }
        return {
            "step_count": step_count(self._base),
            "loss_scaler": scaler_state,
            "precision": self.config.precision,
            "zero_stage": self.config.zero_stage,
            "world_size": self.grid.world_size,
        }

    def load(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Reads weights and, with `state`, the optimizer; see `Engine`."""
        files = StateFiles(folder)
        files.check({name: self._whole_shape(parameter, name) for parameter, name in self._names.items()})
        kinds = ("weight",) if state is None else ("weight", "exp_avg", "exp_avg_sq")
        self._fill(lambda kind, name, start, numel: files.read_shard(kind, name, self._shards.get(name), start, numel), kinds)
        if state is not None:
            set_step_count(self._base, int(state["step_count"]))
            scaler = getattr(self._engine.optimizer, "loss_scaler", None)
            for key, value in state["loss_scaler"].items():
                if hasattr(scaler, key):
                    setattr(scaler, key, value)
        barrier()

    def _whole_shape(self, parameter: Any, name: str) -> tuple[int, ...]:
        local = tuple(getattr(parameter, "ds_shape", parameter.shape))
        return self._shards[name].whole_shape(local) if name in self._shards else local

    def _fill(self, read: Any, kinds: Sequence[str]) -> None:
        """Sets this rank's fragments, and the weights that the model computes with, from `read(kind, name, start, numel)`."""
        for fragment in fragments(self._engine, self._names, self._shards, share=None):
            for kind in kinds:
                fragment.tensors[kind].copy_(read(kind, fragment.name, fragment.start, fragment.numel))
        if self.config.zero_stage == 0:
            return
        with torch.no_grad():
            for parameter, name in self._names.items():
                self._set_computed(parameter, lambda start, numel, name=name: read("weight", name, start, numel))

    def _set_computed(self, parameter: Any, read: Any) -> None:
        """Sets the weights that the forward pass uses: the whole parameter, or under ZeRO 3 this rank's part and a gathered copy."""
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
            return
        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_zero_partition_rank
        numel = min(size, parameter.ds_numel - start)
        if numel > 0:
            parameter.ds_tensor.data.narrow(0, 0, numel).copy_(read(start, numel))
        if parameter.data.numel() == parameter.ds_numel:
            parameter.data.copy_(read(0, parameter.ds_numel).view(parameter.ds_shape))
