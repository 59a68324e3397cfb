"""What every layout's engine does alike: optimizer, precision, normalisation, switch of stages, checkpoints.

In: a model (or the part of it that this rank's pipeline stage holds), stages. Out: the half of the `Engine` interface that does not depend
on how a batch goes through the layers, which `DataParallelEngine` and `PipelineParallelEngine` add.

The loss is normalised over the labels of the **global** batch, counted before the forward pass, so neither masked labels nor the number
of ranks nor the size of a micro-batch changes what is learnt: each micro-batch contributes sum / N, and DeepSpeed's mean over ranks is
undone by their number.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.engine.distributed import barrier, gather_objects
from megatron_patch.engine.environment import threads_per_rank
from megatron_patch.engine.fragments import Fragment, HostCopies, fragments
from megatron_patch.engine.interface import EvaluationResult, ReplicaMismatch, Snapshot, StepGate, StepResult
from megatron_patch.engine.optimizer import base_optimizer, make_optimizer, set_step_count, step_count, zero_moments
from megatron_patch.engine.state_files import StateFiles, write_fragments
from megatron_patch.engine.swapping import SubGroups
from megatron_patch.errors import CheckpointError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import InitialWeights, parameter_groups
from megatron_patch.model.precision import DTYPES
from megatron_patch.model.sharding import VOCABULARY_PARAMETERS, shard_of
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.parallel.groups import Groups, ModelParallelUnit
from megatron_patch.stages import Stage

_CHECKSUM_CHUNK = 1 << 22


_LOSS_SCALER = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


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


@dataclass
class StepOutcome:
    """What one step computed and whether it changed the weights; filled while the step runs.

    Args:
        loss: mean over all scored labels of the global batch, in nats.
        grad_norm: norm of the mean gradient before clipping.
        rejection: the gate's reason to reject the step, or None.
        overflow: whether DeepSpeed skipped the step because a gradient was not finite.
    """

    loss: float = float("nan")
    grad_norm: float = float("nan")
    rejection: str | None = None
    overflow: bool = False


def checksum_of_bits(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns two sums over the bits of a tensor, one of them weighted by position; equal tensors have equal sums."""
    bits = tensor.detach().contiguous().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    plain = weighted = 0
    for number, part in enumerate(bits.split(_CHECKSUM_CHUNK)):
        wide = part.long()
        plain += int(wide.sum())
        weighted += (number + 1) * int((wide * torch.arange(1, wide.numel() + 1, device=wide.device)).sum())
    return plain % 2**63, weighted % 2**63


class DeepSpeedEngine(abc.ABC):
    """One rank's engine, whatever the layout.

    Args:
        build: makes this rank's layers, wherever tensors are made at that time: without memory, or under ZeRO 3 cut into shards at once.
        seed: of the initial weights; None: they will be loaded.
        config: precision, ZeRO stage, DeepSpeed's JSON.
        schedule: the optimizer's settings.
        stage: the first stage.
        groups: this rank's place and process groups.
        device: this rank's device.
    """

    def __init__(
        self,
        build: Callable[[], GPTModel],
        seed: int | None,
        config: EngineConfig,
        schedule: ScheduleOptions,
        stage: Stage,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.grid, self._groups = groups.grid, groups
        settings = {**config.deepspeed, **batch_settings(stage, self.grid.data_parallel_size)}
        self._host = HostCopies(pin_memory=device.type == "cuda")
        dtype = DTYPES[config.precision]
        model = self._build(build, dtype, settings)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._copies, self._model_shape = model.copied_parameters, model.shape
        parallel = model.parallel
        shards = {name: shard_of(name, model.shape, parallel.rank, parallel.size) for name in self._names.values()}
        self._shards = {name: shard for name, shard in shards.items() if shard is not None}
        for parameter, name in self._names.items():
            # DeepSpeed counts a parameter without this mark once over the ranks that share a layer.
            parameter.tensor_model_parallel = name in self._shards  # type: ignore[attr-defined]
        wrapped: nn.Module = model
        if config.zero_stage == 0:
            # Its clipping would not tell the norm.
            settings["gradient_clipping"] = 0.0
            wrapped = MixedPrecision(model, dtype) if dtype != torch.float32 else model
        decayed, undecayed = parameter_groups(model)
        param_groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        optimizer = make_optimizer([group for group in param_groups if group["params"]], schedule, config.offloads_optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._engine = self._initialize(wrapped, optimizer, settings)
        self._base = base_optimizer(self._engine.optimizer)
        if seed is not None:
            initial, shapes = InitialWeights(model.shape, seed, threads_per_rank()), self._whole_shapes()
            # Master weights start from the float32 initial weights, not from their rounded copies.
            self._fill(lambda kind, name, *span: initial.read(name, shapes[name], self._shards.get(name), *span), ("weight",))
        self.start_stage(stage)

    def _build(self, build: Callable[[], GPTModel], dtype: torch.dtype, settings: dict[str, Any]) -> GPTModel:
        """The model on the device, with parameters of any value."""
        if self.config.zero_stage == 3:
            import deepspeed

            mpu = ModelParallelUnit(self._groups) if self._groups.tensor is not None else None
            # Without a dtype, which it would take for bfloat16 on CPUs that do not compute in float16: the settings say which.
            with deepspeed.zero.Init(data_parallel_group=self._groups.data, config_dict_or_path=settings, mpu=mpu):
                model = build()
            assert all(parameter.dtype == dtype for parameter in model.parameters())
            return model
        with torch.device("meta"):
            model = build()
        if self.config.zero_stage > 0:
            model.to(dtype)
        return model.to_empty(device=self.device)

    @abc.abstractmethod
    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        """DeepSpeed's engine around the model."""

    @abc.abstractmethod
    def start_stage(self, stage: Stage) -> None:
        """Takes on a stage's batch and shapes; see `Engine`."""

    def switch_stage(self, stage: Stage) -> None:
        """Takes on the stage and resets or keeps the optimizer; see `Engine`."""
        self.start_stage(stage)
        if stage.optimizer == "keep":
            return
        with self._on_nvme(written=True) as sub_groups:
            zero_moments(self._base.state.values() if sub_groups is None else sub_groups)
        if stage.optimizer == "reset":
            set_step_count(self._base, 0)

    @abc.abstractmethod
    def _local_sums(self, batches: Iterable[PatchBatch]) -> torch.Tensor:
        """float64 [sum of losses, labels] of held-out batches over the ranks that share this one's model."""

    def evaluate(self, batches: Iterable[PatchBatch]) -> EvaluationResult:
        """Mean held-out loss; see `Engine`."""
        sums = self._local_sums(batches)
        self._sum_over_data(sums)
        loss_sum, labels_scored = sums.tolist()
        return EvaluationResult(loss_sum / labels_scored if labels_scored else float("nan"), int(labels_scored))

    def local_loss(self, batch: PatchBatch) -> float:
        """Sum of the losses of this rank's batch alone; see `Engine`."""
        return float(self._local_sums([batch])[0])

    @contextmanager
    def _gated(self, gate: StepGate | None, global_loss: Callable[[], float]) -> Iterator[StepOutcome]:
        """Lets the gate decide, during the block, whether DeepSpeed's step updates the weights.

        DeepSpeed reduces the gradients, computes their norm, clips them and calls the inner optimizer, all inside of one method. The gate
        needs the norm, which is known only there, before any weight changes. Hence a hook: for the duration of the block the inner
        optimizer's `step` is replaced by one that first calls the gate, and then steps unless the gate rejects the step. ZeRO calls
        it once for each part of the weights; the decision of the first call holds for all of them.

        If the gradients overflow, DeepSpeed returns before it calls the optimizer, and the gate sees the loss alone.

        Args:
            gate: decides by loss and norm; None: every step is taken.
            global_loss: returns the mean loss over the global batch; every rank must call it.

        Yields:
            What became of the step, complete at the end of the block.
        """
        engine, optimizer, update = self._engine, self._base, self._base.step
        outcome, decided, skipped_before = StepOutcome(), False, self._engine.skipped_steps

        def check_loss() -> None:
            outcome.loss = global_loss()
            outcome.rejection = None if gate is None else gate.check_loss(outcome.loss)

        def check_grad_norm() -> None:
            # Under ZeRO 0 DeepSpeed neither clips nor returns the norm.
            outcome.grad_norm = float(self._clip_gradients()) if self.config.zero_stage == 0 else self._zero_grad_norm()
            if gate is not None and outcome.rejection is None:
                outcome.rejection = gate.check_grad_norm(outcome.grad_norm)

        def gated_update(*args: Any, **kwargs: Any) -> Any:
            nonlocal decided
            if not decided:
                decided = True
                check_loss()
                check_grad_norm()
            return update(*args, **kwargs) if outcome.rejection is None else None

        optimizer.step = gated_update  # type: ignore[method-assign]
        try:
            yield outcome
        finally:
            del optimizer.step
        if not decided:
            check_loss()
            outcome.grad_norm = self._zero_grad_norm()
        outcome.overflow = engine.skipped_steps > skipped_before
        if outcome.overflow and outcome.rejection is None and self.config.precision != "fp16":
            outcome.rejection = f"the gradient norm is {outcome.grad_norm}"

    def _zero_grad_norm(self) -> float:
        """Returns the norm of the full gradient before clipping, as DeepSpeed's ZeRO optimizer computed it last."""
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        return float("nan") if norm is None else float(norm)

    def _step_result(self, outcome: StepOutcome, forward_seconds: float) -> StepResult:
        """Returns what the training loop needs to know of a step."""
        skipped = outcome.overflow or outcome.rejection is not None
        return StepResult(outcome.loss, outcome.grad_norm, skipped, outcome.rejection, self._loss_scale(), forward_seconds)

    def replica_mismatches(self) -> list[ReplicaMismatch]:
        """Returns the copies of parameters that differ between ranks; see `Engine`. Under ZeRO 3 there are no copies to compare."""
        if self.config.zero_stage == 3:
            return []
        grid = self.grid
        local = {name: checksum_of_bits(parameter.data) for parameter, name in self._names.items()}
        # The ranks that hold a copy of the same tensor: (pipeline rank, parameter, tensor-parallel rank) -> rank -> checksum.
        holders: dict[tuple[int, str, int], dict[int, tuple[int, int]]] = {}
        for rank, gathered in enumerate(gather_objects((grid.pipeline_parallel_rank, grid.tensor_parallel_rank, local))):
            pipeline_rank, tensor_rank, checksums = cast("tuple[int, int, dict[str, tuple[int, int]]]", gathered)
            for name, checksum in checksums.items():
                # Tied embeddings are on the first and on the last pipeline rank.
                pipeline_key = 0 if name in VOCABULARY_PARAMETERS else pipeline_rank
                tensor_key = tensor_rank if shard_of(name, self._model_shape, 0, grid.tensor_parallel_size) else 0
                holders.setdefault((pipeline_key, name, tensor_key), {})[rank] = checksum
        return [
            ReplicaMismatch(name, rank, min(copies))
            for (_, name, _), copies in sorted(holders.items())
            for rank, checksum in copies.items()
            if checksum != copies[min(copies)]
        ]

    def _set_lr(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def _moved(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """To the device."""
        return None if tensor is None else tensor.to(self.device, non_blocking=True)

    def _weights(self, label_weights: Sequence[float]) -> torch.Tensor | None:
        """The label weights as a tensor, or None where all are 1."""
        if all(weight == 1.0 for weight in label_weights):
            return None
        return torch.tensor(label_weights, dtype=torch.float32, device=self.device)

    def _total_weight(self, batches: Sequence[PatchBatch], label_weights: Sequence[float]) -> torch.Tensor:
        """Sum of the weights of all scored labels over all ranks, float64 on the device, above 0."""
        weights = torch.tensor(label_weights, dtype=torch.float64)
        total = sum(
            (((batch.labels != IGNORE_INDEX).sum(dim=(0, 1)) * weights).sum() for batch in batches), torch.zeros((), dtype=torch.float64)
        )
        total = total.to(self.device)
        self._sum_over_data(total)
        return total.clamp(min=1e-30)

    def _sum_over_data(self, tensor: torch.Tensor) -> None:
        """Sums over the ranks that see other samples."""
        if self.grid.data_parallel_size > 1:
            torch.distributed.all_reduce(tensor, group=self._groups.data)

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self.config.precision == "fp16" else None

    def _clip_gradients(self) -> torch.Tensor:
        """Scales all gradients so that their norm over the whole model is at most `clip_grad`; returns the norm before."""
        gradients = {name: p.grad for p, name in self._names.items() if p.grad is not None and name not in self._copies}
        own = torch.nn.utils.get_total_norm([gradients[name] for name in gradients if name in self._shards]).double().square()
        shared = torch.nn.utils.get_total_norm([gradients[name] for name in gradients if name not in self._shards])
        norm = shared
        if self._shards or self.grid.pipeline_parallel_size > 1:
            square = own.to(self.device)
            if self._groups.tensor is not None:
                torch.distributed.all_reduce(square, group=self._groups.tensor)
            square += shared.to(self.device).double().square()
            if self._groups.pipeline is not None:
                torch.distributed.all_reduce(square, group=self._groups.pipeline)
            norm = square.sqrt().to(shared.dtype)
        torch.nn.utils.clip_grads_with_norm_(list(self._names), self.config.clip_grad or float("inf"), norm)
        return norm

    def snapshot(self, to_host: bool) -> Snapshot:
        """This rank's part of a checkpoint; see `Engine`."""
        copies: list[Fragment] | None = None
        if to_host:
            with self._local_fragments() as mine:
                copies = self._host.copies(mine)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        scaler_state = {
            key: getattr(scaler, key) for key in sorted(_LOSS_SCALER) if self.config.precision == "fp16" and hasattr(scaler, key)
        }
        state = {
            "step_count": step_count(self._base),
            "loss_scaler": scaler_state,
            "precision": self.config.precision,
            "zero_stage": self.config.zero_stage,
            "world_size": self.grid.world_size,
            "tensor_parallel_size": self.grid.tensor_parallel_size,
            "pipeline_parallel_size": self.grid.pipeline_parallel_size,
        }

        def write(folder: Path) -> dict[str, ManifestEntry]:
            with self._local_fragments() if copies is None else nullcontext(copies) as mine:
                return write_fragments(folder, self.grid.rank, self.grid.world_size, mine)

        return Snapshot(state, write)

    def _on_nvme(self, written: bool) -> AbstractContextManager[SubGroups | None]:
        """The sub-groups that DeepSpeed keeps on NVMe between steps, or None where all is in memory."""
        return SubGroups(self._engine.optimizer, self._base, written) if self.config.offloads_to_nvme else nullcontext()

    @contextmanager
    def _local_fragments(self) -> Iterator[list[Fragment]]:
        """What of a checkpoint this rank writes."""
        share = (self.grid.data_parallel_rank, self.grid.data_parallel_size)
        # What all ranks of a layer hold is written by the first of them.
        first = self.grid.tensor_parallel_rank == 0
        with self._on_nvme(written=False) as sub_groups:
            found = fragments(self._engine, self._names, self._shards, share, sub_groups)
            yield [f for f in found if (first or f.shard is not None) and f.name not in self._copies]

    def load(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Reads weights and, with `state`, the optimizer; see `Engine`."""
        files = StateFiles(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        for part in gather_objects(self._whole_shapes()):
            shapes.update(part)  # type: ignore[call-overload]
        files.check(shapes, self._model_shape.vocab_size)
        kinds = ("weight",) if state is None else ("weight", "exp_avg", "exp_avg_sq")
        self._fill(lambda kind, name, start, numel: files.read_shard(kind, name, self._shards.get(name), start, numel), kinds)
        if state is not None:
            steps, scale = state.get("step_count"), state.get("loss_scaler")
            if type(steps) is not int or not isinstance(scale, dict):
                raise CheckpointError(f"{folder}: the engine's state is {dict(state)}", "step_count and loss_scaler", "resume from another")
            set_step_count(self._base, steps)
            scaler = getattr(self._engine.optimizer, "loss_scaler", None)
            for key in _LOSS_SCALER & scale.keys():
                if hasattr(scaler, key):
                    setattr(scaler, key, scale[key])
        barrier()

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that this rank holds parts of."""
        local = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter, name in self._names.items()}
        return {name: self._shards[name].whole_shape(shape) if name in self._shards else shape for name, shape in local.items()}

    def _fill(self, read: Any, kinds: Sequence[str]) -> None:
        """Sets this rank's fragments, and the weights that the model computes with, from `read(kind, name, start, numel)`."""
        masters: dict[str, Fragment] = {}
        with self._on_nvme(written=True) as sub_groups:
            for fragment in fragments(self._engine, self._names, self._shards, None, sub_groups):
                masters[fragment.name] = fragment
                for kind in kinds:
                    fragment.tensors[kind].copy_(read(kind, fragment.name, fragment.start, fragment.numel))
        if self.config.zero_stage == 0:
            return
        with torch.no_grad():
            for parameter, name in self._names.items():
                master = masters.get(name)
                if master is not None and not hasattr(parameter, "ds_id") and master.numel == parameter.numel():
                    # Without other data-parallel ranks all of it is here, and need not be read again.
                    parameter.data.copy_(master.tensors["weight"].view(parameter.shape))
                    continue
                self._set_computed(parameter, lambda start, numel, name=name: read("weight", name, start, numel))

    def _set_computed(self, parameter: Any, read: Any) -> None:
        """Sets the weights that the forward pass uses: the whole parameter, or under ZeRO 3 this rank's part and a gathered copy."""
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
            return
        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_zero_partition_rank
        numel = min(size, parameter.ds_numel - start)
        # Partitions on NVMe were written with their master weights.
        if numel > 0 and parameter.ds_tensor.status.name != "NOT_AVAILABLE":
            parameter.ds_tensor.data.narrow(0, 0, numel).copy_(read(start, numel))
        if parameter.data.numel() == parameter.ds_numel:
            parameter.data.copy_(read(0, parameter.ds_numel).view(parameter.ds_shape))
