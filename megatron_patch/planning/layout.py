"""How a run is laid out over ranks, as plain numbers. In: a resolved run and its engine configuration. Out: `Layout`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.deepspeed_config import EngineConfig, Precision
from megatron_patch.model.pipeline_partition import Balance, pipeline_partition
from megatron_patch.model.shape import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """Ranks and what each of them keeps.

    Args:
        ranks: all of them.
        tensor: ranks that share each layer.
        pipeline: ranks that share the list of layers.
        sequence_parallel: norms and residual stream are cut along positions.
        zero_stage: what ZeRO shards over data-parallel ranks.
        precision: of weights and activations.
        recompute: what the backward pass computes again.
        balance: what pipeline stages are made even in.
        balance_positions: positions of a sample, for balancing FLOPs.
        bucket_elements: of the buffers in which ZeRO 1 to 3 collect gradients.
        offload_optimizer: optimizer states live in host memory.
        offload_weights: so do weights.
    """

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    balance: Balance = "parameters"
    balance_positions: int = 2048
    bucket_elements: int = 500_000_000
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def data(self) -> int:
        """Ranks that hold the same part of the model and read other samples."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def element_bytes(self) -> int:
        """Of a weight or an activation in the forward pass."""
        return 4 if self.precision == "fp32" else 2

    def parts(self, shape: ModelShape) -> list[range]:
        """The layers (0: embedding, 1 to L: blocks, L + 1: final norm and head) of each pipeline stage."""
        bounds = pipeline_partition(shape, self.pipeline, self.balance, self.balance_positions)
        return [range(start, end) for start, end in itertools.pairwise(bounds)]

    def name(self) -> str:
        """The layout in short: TP8 SP PP4 DP32 ZeRO 1."""
        words = [f"TP{self.tensor}"] if self.tensor > 1 else []
        words += ["SP"] if self.sequence_parallel else []
        words += [f"PP{self.pipeline}"] if self.pipeline > 1 else []
        words += [f"DP{self.data}", f"ZeRO {self.zero_stage}", self.precision]
        return " ".join(words + ([f"recompute {self.recompute}"] if self.recompute != "none" else []))


def layout_of(run: RunConfig, engine: EngineConfig) -> Layout:
    """The layout that a run asks for."""
    options, zero = run.options.engine, engine.deepspeed["zero_optimization"]

    def offloaded(part: str) -> bool:
        return bool((zero.get(part) or {}).get("device", "none") != "none")

    return Layout(
        ranks=run.data_parallel_size * options.tensor_model_parallel_size * options.pipeline_model_parallel_size,
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        sequence_parallel=options.sequence_parallel,
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        recompute=options.recompute_granularity,
        balance=options.pipeline_balance,
        balance_positions=run.options.stages.seq_length,
        bucket_elements=int(zero.get("reduce_bucket_size", 500_000_000)),
        offload_optimizer=offloaded("offload_optimizer"),
        offload_weights=offloaded("offload_param"),
    )
