"""The part of the engine that is the same for every layout: optimizer, precision, the step gate, the switch, checkpoints.

In: this rank's part of the model, stages. Out: the methods of `Engine` that do not depend on how a batch goes through the layers.
`DataParallelEngine` and `PipelineParallelEngine` add the others.

The loss is normalized by N, the number of labels of the **global** batch, which is counted before the forward pass. So the gradient
depends neither on how masked labels are distributed, nor on the number of ranks, nor on the micro-batch size: each micro-batch
contributes sum / N, and a factor equal to the number of ranks undoes DeepSpeed's mean over ranks.

No gradient is rounded below float32 between the backward pass of a micro-batch and the optimizer, in any layout, unless the user's
DeepSpeed JSON says otherwise (tests/distributed/test_gradients.py).
"""

from __future__ import annotations

import abc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.engine.distributed import barrier, gather_objects
from megatron_patch.engine.environment import threads_per_rank
from megatron_patch.engine.expert_balance import ExpertBalancer
from megatron_patch.engine.expert_groups import mark_experts
from megatron_patch.engine.fragments import Fragment, HostBuffers, fragments
from megatron_patch.engine.hidden_matrices import attach_hidden_matrices, require_attachable
from megatron_patch.engine.interface import EvaluationResult, ReplicaMismatch, Snapshot, StepGate, StepResult
from megatron_patch.engine.mixed_precision import MixedPrecision
from megatron_patch.engine.replicas import compare_replicas
from megatron_patch.engine.state_files import StateFiles, write_fragments
from megatron_patch.engine.swapping import SubGroups
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import InitialWeights
from megatron_patch.model.precision import DTYPES
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import expert_shard, is_expert_parameter, shard_of
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.ops.documents_attention import Documents
from megatron_patch.optimizers.groups import LR_SCALE, parameter_groups
from megatron_patch.optimizers.muon import OrthogonalizedMomentum
from megatron_patch.optimizers.registry import optimizer_type
from megatron_patch.optimizers.state import base_optimizer, make_optimizer, require_elementwise, set_step_count, step_count, zero_state
from megatron_patch.parallel.context import UNSHARED
from megatron_patch.parallel.groups import Groups, ModelParallelUnit
from megatron_patch.parallel.tensor import TensorParallel
from megatron_patch.stages import Stage

_LOSS_SCALER = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
"""The fields of DeepSpeed's loss scaler that a checkpoint keeps."""


@dataclass(frozen=True)
class ModelSource:
    """Where the model of a rank comes from.

    Args:
        build: builds this rank's layers; it is called on the meta device, or under ZeRO 3 in a context that shards each parameter at once.
        shape: the shape of the full model.
        parallel: the ranks that share each layer.
        seed: seed of the initial weights; None: no initial weights, because a checkpoint will be loaded.
        has_buffers: whether the model may have buffers that `build` computes, for which it is called on this rank's device.
    """

    build: Callable[[], nn.Module]
    shape: ModelShape
    parallel: TensorParallel
    seed: int | None
    has_buffers: bool = False


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


@contextmanager
def _checked_optimizer() -> Iterator[None]:
    """Hides DeepSpeed's warning of an untested optimizer: the engine checks that it works on partitions, or collects full matrices."""
    from deepspeed.utils import logger

    def is_another(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


class DeepSpeedEngine(abc.ABC):
    """One rank's engine, without the parts that depend on the layout.

    Args:
        source: builds this rank's layers.
        config: precision, ZeRO level, DeepSpeed's JSON.
        schedule: the optimizer's settings.
        stage: the stage to begin with.
        groups: this rank's coordinates and process groups.
        device: this rank's device.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig,
        schedule: ScheduleOptions,
        stage: Stage,
        groups: Groups,
        device: torch.device,
    ) -> None:
        config.require_device(device.type)
        self.config, self.device = config, device
        self.grid, self._groups = groups.grid, groups
        settings = {**config.deepspeed, **batch_settings(stage, self.grid.data_parallel_size)}
        self._context = UNSHARED
        self._host_buffers = HostBuffers(pin_memory=device.type == "cuda")
        dtype = DTYPES[config.precision]
        model = self._build(source, dtype, settings)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._balancer = ExpertBalancer(model, source.shape, groups, device)
        self._tied_copies = model.tied_copies if isinstance(model, GPTModel) else frozenset()
        self._model_shape, parallel = source.shape, source.parallel
        divided = groups.experts
        own_experts = expert_shard(parallel.rank, parallel.size, divided.rank, divided.size)
        shards = {
            name: own_experts if is_expert_parameter(name) else shard_of(name, source.shape, parallel.rank, parallel.size)
            for name in self._names.values()
        }
        self._shards = {name: shard for name, shard in shards.items() if shard is not None}
        for parameter, name in self._names.items():
            # Without this mark, DeepSpeed counts the parameter on only one tensor-parallel rank in the gradient norm.
            parameter.tensor_model_parallel = name in self._shards  # type: ignore[attr-defined]
        wrapped: nn.Module = model
        if config.zero_level == 0:
            # At ZeRO 0 `_clip_gradients` clips, because DeepSpeed's clipping does not return the norm; at ZeRO 1 to 3 DeepSpeed clips.
            settings["gradient_clipping"] = 0.0
            wrapped = MixedPrecision(model, dtype) if dtype != torch.float32 else model
        expert_group = mark_experts(wrapped, self._names, groups) if divided.size > 1 else None
        param_groups = parameter_groups(self._names, schedule, optimizer_type(schedule.optimizer), expert_group)
        has_parts = config.zero_level > 0 or parallel.size * divided.size > 1
        if has_parts:
            require_elementwise(schedule, config.offloads_optimizer, device)
        optimizer = make_optimizer(param_groups, schedule, config.offloads_optimizer)
        if has_parts:
            require_attachable(optimizer, schedule)
        if config.zero_level > 0 and isinstance(optimizer, torch.optim.Adagrad):
            # DeepSpeed makes another Adagrad with one group of all parameters, so learning rates and weight decays would be lost.
            raise ConfigError(
                f"the optimizer {schedule.optimizer} is torch's Adagrad, which DeepSpeed replaces by its own at ZeRO 1 to 3",
                "--zero-stage 0 with torch.optim.Adagrad, or another optimizer",
                "use --zero-stage 0, or write Adagrad as an optimizer of your own",
            )
        with warnings.catch_warnings(), _checked_optimizer():
            warnings.simplefilter("ignore", FutureWarning)
            self._engine = self._initialize(wrapped, optimizer, settings)
        self._optimizer = base_optimizer(self._engine.optimizer)
        if isinstance(self._optimizer, OrthogonalizedMomentum):
            attach_hidden_matrices(self._optimizer, self._engine, config, self._names, self._shards, groups.same_layers, device)
        if source.seed is not None:
            initial, shapes = InitialWeights(source.shape, source.seed, threads_per_rank()), self._full_shapes()
            # Master weights start from the float32 initial weights, not from their rounded copies.
            self._set_tensors(lambda kind, name, *span: initial.read(name, shapes[name], self._shards.get(name), *span), ("weight",))
        self.start_stage(stage)

    def _build(self, source: ModelSource, dtype: torch.dtype, settings: dict[str, Any]) -> nn.Module:
        """Returns the model on this rank's device; the values of its parameters do not count yet."""
        if self.config.zero_level == 3:
            import deepspeed

            mpu = ModelParallelUnit(self._groups) if self._groups.tensor is not None else None
            # No dtype argument: on CPUs without float16, DeepSpeed would replace it by bfloat16. The settings determine the dtype.
            with deepspeed.zero.Init(data_parallel_group=self._groups.data, config_dict_or_path=settings, mpu=mpu):
                model = source.build()
            assert all(parameter.dtype == dtype for parameter in model.parameters())
            return model
        with torch.device(self.device if source.has_buffers else "meta"):
            model = source.build()
        if self.config.zero_level > 0:
            model.to(dtype)
        return model.to(self.device) if source.has_buffers else model.to_empty(device=self.device)

    @abc.abstractmethod
    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        """Returns DeepSpeed's engine for the model and the optimizer."""

    @abc.abstractmethod
    def start_stage(self, stage: Stage) -> None:
        """Applies a stage's batch sizes and shapes; see `Engine`."""

    def switch_stage(self, stage: Stage) -> None:
        """Switches to a stage, and keeps or resets the optimizer's state; see `Engine`."""
        self.start_stage(stage)
        if stage.optimizer == "keep":
            return
        with self._on_nvme(written=True) as sub_groups:
            zero_state(self._optimizer.state.values() if sub_groups is None else sub_groups)
        if stage.optimizer == "reset":
            set_step_count(self._optimizer, 0)

    @abc.abstractmethod
    def _evaluation_sums(self, batches: Iterable[PatchBatch], corpora: Sequence[int] = ()) -> torch.Tensor:
        """Returns sums over held-out batches on this replica.

        Args:
            batches: the batches.
            corpora: numbers of the corpora that are also summed alone.

        Returns:
            [sum of losses, number of scored labels] of all batches, and then of each of the corpora; float64 [1 + corpora, 2].
        """

    def evaluate(self, batches: Iterable[PatchBatch]) -> EvaluationResult:
        """Returns the mean held-out loss, and that of each corpus; see `Engine`."""
        batches = list(batches)
        corpora = sorted({batch.corpus for batch in batches})
        sums = self._evaluation_sums(batches, corpora if len(corpora) > 1 else ())
        self._sum_over_data(sums)
        total, *parts = [EvaluationResult(loss_sum / count if count else float("nan"), int(count)) for loss_sum, count in sums.tolist()]
        return replace(total, corpora=dict(zip(corpora, parts or [total], strict=False)))

    def local_loss(self, batch: PatchBatch) -> float:
        """Returns the loss sum of one batch on this replica, or on those that share its positions; see `Engine`."""
        loss_sum = self._evaluation_sums([batch])[0, 0].clone()
        if self._context.size > 1:
            torch.distributed.all_reduce(loss_sum, group=dict(self._groups.context)[self._context.size])
        return float(loss_sum)

    @contextmanager
    def _gated(self, gate: StepGate | None, global_loss: Callable[[], float]) -> Iterator[StepOutcome]:
        """Lets the gate decide, during the block, whether DeepSpeed's step updates the weights.

        One method of DeepSpeed reduces the gradients, computes their norm, clips them and calls the inner optimizer. The gate needs the
        norm before any weight changes, and only that method knows it. Hence a hook: for the duration of the block, the inner optimizer's
        `step` first calls the gate and then steps, unless the gate rejects the step. ZeRO calls `step` once for each group of weights;
        the decision of the first call holds for all of them.

        If a gradient is not finite, DeepSpeed may return before it calls the optimizer; the gate then checks only the loss.

        Args:
            gate: decides by loss and norm; None: every step is taken.
            global_loss: returns the mean loss over the global batch; every rank must call it.

        Yields:
            The outcome of the step, which is complete at the end of the block.
        """
        engine, optimizer, update = self._engine, self._optimizer, self._optimizer.step
        outcome, decided, skipped_before = StepOutcome(), False, self._engine.skipped_steps

        def check_loss() -> None:
            outcome.loss = global_loss()
            outcome.rejection = None if gate is None else gate.check_loss(outcome.loss)

        def check_grad_norm() -> None:
            outcome.grad_norm = float(self._clip_gradients()) if self.config.zero_level == 0 else self._zero_grad_norm()
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
        """Returns the record of a step for the training loop."""
        skipped = outcome.overflow or outcome.rejection is not None
        experts = self._balancer.finish_step(taken=not skipped)
        return StepResult(outcome.loss, outcome.grad_norm, skipped, outcome.rejection, self._loss_scale(), forward_seconds, experts)

    def replica_mismatches(self) -> list[ReplicaMismatch]:
        """Returns the copies of parameters that differ between ranks; see `Engine`. Under ZeRO 3 there are no copies to compare."""
        if self.config.zero_level == 3:
            return []
        return compare_replicas(self._named_tensors(), self._model_shape, self.grid, self._groups.experts.size)

    def _named_tensors(self) -> dict[torch.Tensor, str]:
        """Returns what this rank holds of the model -> its names: parameters, and the state of the balance of experts."""
        found: dict[torch.Tensor, str] = dict(self._names.items())
        for name, tensor in self._balancer.states.items():
            found[tensor] = name
        return found

    def _set_lr(self, lr: float) -> None:
        """Sets the learning rate of all parameter groups, some of which have a multiple of it."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_SCALE, 1.0)

    def _to_device(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the tensor on this rank's device."""
        return None if tensor is None else tensor.to(self.device, non_blocking=True)

    def _documents(self, batch: PatchBatch) -> Documents | None:
        """Returns where the batch's documents begin and end, for attention on this rank's device."""
        return None if batch.documents is None else batch.documents.to(self.device)

    def _label_weights(self, label_weights: Sequence[float]) -> torch.Tensor | None:
        """Returns the label weights as a float32 tensor [K], or None if all are 1."""
        if all(weight == 1.0 for weight in label_weights):
            return None
        return torch.tensor(label_weights, dtype=torch.float32, device=self.device)

    def _total_weight(self, batches: Sequence[PatchBatch], label_weights: Sequence[float]) -> torch.Tensor:
        """Returns the sum of the weights of all scored labels over all ranks, float64 on the device, above 0."""
        weights = torch.tensor(label_weights, dtype=torch.float64)
        total = sum(
            (((batch.labels != IGNORE_INDEX).sum(dim=(0, 1)) * weights).sum() for batch in batches), torch.zeros((), dtype=torch.float64)
        )
        total = total.to(self.device)
        self._sum_over_data(total)
        return total.clamp(min=1e-30)

    def _sum_over_data(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the data-parallel ranks, in place."""
        if self.grid.data_parallel_size > 1:
            torch.distributed.all_reduce(tensor, group=self._groups.data)

    def _loss_scale(self) -> float | None:
        """Returns the loss scale in float16, else None."""
        return float(self._engine.optimizer.loss_scale) if self.config.precision == "fp16" else None

    def _clip_gradients(self) -> torch.Tensor:
        """Scales all gradients so that the norm over the full model is at most `clip_grad`, and returns the norm before clipping."""
        gradients = {name: p.grad for p, name in self._names.items() if p.grad is not None and name not in self._tied_copies}
        divided = self._groups.experts
        experts = {name for name in gradients if divided.size > 1 and is_expert_parameter(name)}

        def square(names: Iterable[str]) -> torch.Tensor:
            return torch.nn.utils.get_total_norm([gradients[name] for name in names]).double().square()

        sharded = square(name for name in gradients if name in self._shards and name not in experts)
        if experts:
            # Ranks with the same experts have the same gradients of them; the squares are summed over the ranks with different ones.
            of_experts = square(name for name in gradients if name in experts).to(self.device)
            torch.distributed.all_reduce(of_experts, group=divided.group)
            sharded = sharded.to(self.device) + of_experts
        replicated = torch.nn.utils.get_total_norm([gradients[name] for name in gradients if name not in self._shards])
        norm = replicated
        if self._shards or self.grid.pipeline_parallel_size > 1:
            total = sharded.to(self.device)
            if self._groups.tensor is not None:
                torch.distributed.all_reduce(total, group=self._groups.tensor)
            total += replicated.to(self.device).double().square()
            if self._groups.pipeline is not None:
                torch.distributed.all_reduce(total, group=self._groups.pipeline)
            norm = total.sqrt().to(replicated.dtype)
        torch.nn.utils.clip_grads_with_norm_(list(self._names), self.config.clip_grad or float("inf"), norm)
        return norm

    def snapshot(self, to_host: bool) -> Snapshot:
        """Returns this rank's part of a checkpoint; see `Engine`."""
        host_copies: list[Fragment] | None = None
        if to_host:
            with self._fragments_to_write() as local:
                host_copies = self._host_buffers.copy(local)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        scaler_state = {
            key: getattr(scaler, key) for key in sorted(_LOSS_SCALER) if self.config.precision == "fp16" and hasattr(scaler, key)
        }
        state = {
            "step_count": step_count(self._optimizer),
            "loss_scaler": scaler_state,
            "precision": self.config.precision,
            "zero_stage": self.config.zero_level,
            "world_size": self.grid.world_size,
            "tensor_parallel_size": self.grid.tensor_parallel_size,
            "pipeline_parallel_size": self.grid.pipeline_parallel_size,
        }

        def write(folder: Path) -> dict[str, ManifestEntry]:
            with self._fragments_to_write() if host_copies is None else nullcontext(host_copies) as local:
                return write_fragments(folder, self.grid.rank, self.grid.world_size, local)

        return Snapshot(state, write)

    def _on_nvme(self, written: bool) -> AbstractContextManager[SubGroups | None]:
        """Returns access to the sub-groups that DeepSpeed keeps on NVMe between steps, or None if everything is in memory."""
        return SubGroups(self._engine.optimizer, self._optimizer, written) if self.config.offloads_to_nvme else nullcontext()

    @contextmanager
    def _fragments_to_write(self) -> Iterator[list[Fragment]]:
        """Yields the fragments that this rank writes into a checkpoint: over all ranks, each element exactly once."""
        share = (self.grid.data_parallel_rank, self.grid.data_parallel_size)
        # A parameter that is not sharded is on all tensor-parallel ranks; the first of them writes it.
        writes_replicated = self.grid.tensor_parallel_rank == 0
        with self._on_nvme(written=False) as sub_groups:
            size = self._groups.experts.size
            expert_share = (share[0] // size, share[1] // size) if size > 1 else None
            local = fragments(self._engine, self._names, self._shards, share, sub_groups, expert_share)
            written = [f for f in local if (writes_replicated or f.shard is not None) and f.name not in self._tied_copies]
            yield written + (self._balance_fragments() if writes_replicated and share[0] == 0 else [])

    def _balance_fragments(self) -> list[Fragment]:
        """Returns the state of the balance of experts as fragments without optimizer state."""
        states = self._balancer.states.items()
        return [Fragment(name, tuple(state.shape), None, 0, state.numel(), {"weight": state}) for name, state in states]

    def load(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Loads weights and, with `state`, the optimizer; see `Engine`."""
        files = StateFiles(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        states = self._balancer.states
        for local_shapes in gather_objects(self._full_shapes() | {name: tuple(state.shape) for name, state in states.items()}):
            shapes.update(local_shapes)  # type: ignore[call-overload]
        files.check(shapes, self._model_shape.vocab_size)
        kinds = ("weight",) if state is None else None
        self._set_tensors(lambda kind, name, start, numel: files.read_shard(kind, name, self._shards.get(name), start, numel), kinds)
        for name, tensor in states.items():
            tensor.copy_(files.weight(name))
        if state is not None:
            steps, scale = state.get("step_count"), state.get("loss_scaler")
            if type(steps) is not int or not isinstance(scale, dict):
                raise CheckpointError(
                    f"{folder}: the engine's state is {dict(state)}",
                    "step_count, a whole number, and loss_scaler, a mapping",
                    "resume from another checkpoint",
                )
            set_step_count(self._optimizer, steps)
            scaler = getattr(self._engine.optimizer, "loss_scaler", None)
            for key in _LOSS_SCALER & scale.keys():
                if hasattr(scaler, key):
                    setattr(scaler, key, scale[key])
        barrier()

    def close(self) -> None:
        """Removes DeepSpeed's hooks; see `Engine`."""
        self._engine.destroy()

    def _full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the full shape of each parameter of which this rank holds a part, by name."""
        local = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter, name in self._names.items()}
        return {name: self._shards[name].full_shape(shape) if name in self._shards else shape for name, shape in local.items()}

    def _set_tensors(self, read: Any, kinds: Sequence[str] | None) -> None:
        """Sets this rank's master weights and optimizer state, and the weights of the forward pass.

        Args:
            read: (kind, name, start, numel) -> float32 [numel], a span of this rank's shard of the parameter, flattened.
            kinds: "weight" and the kinds of optimizer state to set; None: all that the optimizer keeps.
        """
        masters: dict[str, Fragment] = {}
        with self._on_nvme(written=True) as sub_groups:
            for fragment in fragments(self._engine, self._names, self._shards, None, sub_groups):
                masters[fragment.name] = fragment
                for kind in fragment.tensors if kinds is None else kinds:
                    fragment.tensors[kind].copy_(read(kind, fragment.name, fragment.start, fragment.numel))
        if self.config.zero_level == 0:
            return
        with torch.no_grad():
            for parameter, name in self._names.items():
                master = masters.get(name)
                if master is not None and not hasattr(parameter, "ds_id") and master.numel == parameter.numel():
                    # This rank holds the full master weight, so that it need not be read again.
                    parameter.data.copy_(master.tensors["weight"].view(parameter.shape))
                    continue
                self._set_forward_weight(parameter, lambda start, numel, name=name: read("weight", name, start, numel))

    def _set_forward_weight(self, parameter: Any, read: Any) -> None:
        """Sets the weight that the forward pass uses: all of it, or under ZeRO 3 this rank's part and, if present, the gathered copy.

        Args:
            parameter: the parameter.
            read: (start, numel) -> float32 [numel], a span of the flattened parameter.
        """
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
            return
        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_zero_partition_rank
        numel = min(size, parameter.ds_numel - start)
        # Parts on NVMe have been written together with their master weights.
        if numel > 0 and parameter.ds_tensor.status.name != "NOT_AVAILABLE":
            parameter.ds_tensor.data.narrow(0, 0, numel).copy_(read(start, numel))
        if parameter.data.numel() == parameter.ds_numel:
            parameter.data.copy_(read(0, parameter.ds_numel).view(parameter.ds_shape))
