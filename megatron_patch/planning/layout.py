"""The layout of a run over ranks, as plain numbers. In: a resolved run and its engine configuration. Out: `Layout`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.deepspeed_config import EngineConfig, Precision
from megatron_patch.model.pipeline_partition import Balance, pipeline_partition
from megatron_patch.model.shape import ModelShape
from megatron_patch.optimizers.registry import optimizer_type

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class PlannedOptimizer:
    """What a plan must know of a run's optimizer.

    Args:
        name: its name.
        hidden_states: number of float32 values that it keeps for each element of a hidden matrix.
        other_states: the same for all other parameters.
        full_matrices: whether its update of a hidden matrix needs the full matrix.
        newton_schulz_steps: Newton-Schulz steps of this update.
        nesterov: whether this update looks ahead along the momentum.
    """

    name: str = "adamw"
    hidden_states: int = 2
    other_states: int = 2
    full_matrices: bool = False
    newton_schulz_steps: int = 5
    nesterov: bool = True


@dataclass(frozen=True)
class Layout:
    """The layout of a run: its ranks, and how the model's states are divided among them.

    Args:
        ranks: total number of ranks.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        sequence_parallel: whether norms and the residual stream are sharded along positions.
        zero_level: ZeRO level, 0 to 3.
        precision: dtype of weights and activations.
        recompute: which activations the backward pass recomputes.
        compiled: whether torch.compile joins the operators of a block.
        balance: quantity that is divided evenly among pipeline ranks.
        balance_positions: positions per sample, used when FLOPs are balanced.
        communication_bytes: bytes of a gradient's element when data-parallel ranks sum it.
        immediate_gradients: whether ZeRO 1 adds each bfloat16 gradient to its float32 sum within the backward pass and then frees it.
        bucket_elements: size of the buffers in which ZeRO 1 to 3 collect gradients.
        prefetch_elements: weights that ZeRO 3 gathers in one call; a larger matrix is gathered alone.
        offload_optimizer: whether optimizer states are in host memory.
        offload_weights: whether weights are in host memory.
        sub_group_elements: elements of a rank's shard that ZeRO 3 steps at a time.
        optimizer: the optimizer.
        context: context-parallel size of each stage, by which neighbors in the data-parallel dimension share samples; for the name.
        experts: expert-parallel size: neighbors in the data-parallel dimension that divide the experts.
        context_exchange: how they exchange keys; None: they gather them only where they cannot share the heads.
    """

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    zero_level: int = 1
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    compiled: bool = False
    balance: Balance = "parameters"
    balance_positions: int = 2048
    communication_bytes: int = 4
    immediate_gradients: bool = True
    bucket_elements: int = 500_000_000
    prefetch_elements: int = 50_000_000
    offload_optimizer: bool = False
    offload_weights: bool = False
    sub_group_elements: int = 1_000_000_000
    optimizer: PlannedOptimizer = PlannedOptimizer()
    context: tuple[int, ...] = (1,)
    experts: int = 1
    context_exchange: Literal["a2a", "all_gather"] | None = None

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that hold the same part of the model; they read different samples, or parts of the same samples."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation in the forward pass."""
        return 4 if self.precision == "fp32" else 2

    def layers_by_pipeline_rank(self, shape: ModelShape) -> list[range]:
        """Returns the layers of each pipeline rank: 0 is the embedding, 1 to L are blocks, L + 1 is the final norm and head."""
        bounds = pipeline_partition(shape, self.pipeline, self.balance, self.balance_positions)
        return [range(start, end) for start, end in itertools.pairwise(bounds)]

    def name(self) -> str:
        """Returns the layout in short form, such as "TP8 SP PP4 DP32 ZeRO 1 bf16", or "CP1/4 DP32 …" with a degree for each stage."""
        parts = [f"TP{self.tensor}"] if self.tensor > 1 else []
        parts += ["SP"] if self.sequence_parallel else []
        parts += [f"PP{self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"EP{self.experts}"] if self.experts > 1 else []
        parts += [f"CP{'/'.join(map(str, dict.fromkeys(self.context)))}"] if max(self.context) > 1 else []
        parts += [f"DP{self.data}", f"ZeRO {self.zero_level}", self.precision]
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return " ".join(parts + (["compiled"] if self.compiled else []))


def layout_of(run: RunConfig, engine_config: EngineConfig) -> Layout:
    """Returns the layout that a run's options set."""
    options, zero = run.options.engine, engine_config.deepspeed["zero_optimization"]
    schedule = run.options.schedule
    kind = optimizer_type(schedule.optimizer)

    def offloaded(part: str) -> bool:
        return bool((zero.get(part) or {}).get("device", "none") != "none")

    return Layout(
        ranks=run.ranks,
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        sequence_parallel=options.sequence_parallel,
        zero_level=engine_config.zero_level,
        precision=engine_config.precision,
        recompute=options.recompute_granularity,
        compiled=options.compile,
        balance=options.pipeline_balance,
        balance_positions=run.options.stages.seq_length,
        communication_bytes=engine_config.communication_bytes,
        immediate_gradients=bool(engine_config.deepspeed.get("bf16", {}).get("immediate_grad_update", True)),
        bucket_elements=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch_elements=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload_optimizer=offloaded("offload_optimizer"),
        offload_weights=offloaded("offload_param"),
        sub_group_elements=int(zero.get("sub_group_size", 1_000_000_000)),
        optimizer=PlannedOptimizer(
            schedule.optimizer,
            kind.hidden_states,
            kind.other_states,
            kind.full_matrices,
            schedule.muon_num_ns_steps,
            schedule.muon_nesterov,
        ),
        experts=options.expert_model_parallel_size,
        context=tuple(stage.context_parallel_size for stage in run.plan.stages),
        context_exchange=options.cp_comm_type,
    )
