"""Checks that ranks can share the positions of the samples of each stage (context parallelism), before anything starts.

In: options, the plan, the model's shape, the number of data-parallel ranks. Out: nothing, or one ConfigError with all that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_patch.config.options import EngineOptions
from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import gathers_keys, heads_of_rank
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.utils.findings import Findings
from megatron_patch.utils.units import plural

_SHOWN = 8
_LARGEST_SHOWN = 1024


@dataclass(frozen=True)
class _Condition:
    """What a context-parallel size must fit.

    Args:
        text: how an error calls it.
        fits: whether a size fits it.
        advice: what else can be changed.
    """

    text: str
    fits: Callable[[int], bool]
    advice: str


def check_context_parallel(options: EngineOptions, plan: StagePlan, shape: ModelShape, data_parallel_size: int) -> None:
    """Checks the context-parallel size of each stage.

    An evaluation has the size of the stage that is running. Its samples are as long as those of the stage, or at K = 1 as long as
    --seq-length, which is a multiple of them. So it needs no check of its own.

    Args:
        options: the parallel sizes.
        plan: the stages.
        shape: the model's shape.
        data_parallel_size: ranks that hold the same part of the model.

    Raises:
        ConfigError: a size does not divide the data-parallel ranks, the positions or, with --cp-comm-type a2a, the heads; the message has
            all findings.
    """
    findings = Findings("with context parallelism")
    stages: dict[tuple[int, int], list[str]] = {}
    for stage in plan.stages:
        stages.setdefault((stage.context_parallel_size, stage.positions), []).append(repr(stage.name))
    for (size, positions), names in stages.items():
        conditions = _conditions(options, shape, data_parallel_size, positions)
        missed = [condition for condition in conditions if not condition.fits(size)]
        if missed:
            findings.add(
                f"{_given(size, ' and '.join(names[:2]))}: it does not fit {', '.join(condition.text for condition in missed)}",
                f"sizes that fit: {_fitting(conditions, data_parallel_size)}",
                f"change the size, or {', or '.join(dict.fromkeys(condition.advice for condition in missed))}",
            )
    findings.raise_all()


def _conditions(options: EngineOptions, shape: ModelShape, data_parallel_size: int, positions: int) -> list[_Condition]:
    """Returns what the context-parallel size of a stage with samples of so many positions must fit."""
    tensor = options.tensor_model_parallel_size
    sequence = tensor if options.sequence_parallel else 1
    heads, groups = heads_of_rank(shape, tensor)
    of_rank = " of a tensor-parallel rank" if tensor > 1 else ""
    in_parts = f" in {sequence} parts of --sequence-parallel" if sequence > 1 else ""
    conditions = [
        _Condition(
            plural(data_parallel_size, "data-parallel rank"), lambda size: data_parallel_size % size == 0, "change the number of ranks"
        ),
        _Condition(
            f"samples of {plural(positions, 'position')}{in_parts}",
            lambda size: positions % (size * sequence) == 0,
            "change --seq-length or the stage's patch_size",
        ),
    ]
    if options.cp_comm_type == "a2a":
        conditions += [
            _Condition(f"{plural(heads, 'query head')}{of_rank}", lambda size: heads % size == 0, "give --cp-comm-type all_gather"),
            _Condition(
                f"{plural(groups, 'key-value head')}{of_rank}",
                lambda size: groups % size == 0 or size % groups == 0,
                "give --cp-comm-type all_gather",
            ),
        ]
    return conditions


def gathering_notes(options: EngineOptions, plan: StagePlan, shape: ModelShape) -> list[str]:
    """Returns a note for each context-parallel size with which the ranks gather keys and values although nobody asked for it."""
    if options.cp_comm_type is not None:
        return []
    tensor = options.tensor_model_parallel_size
    heads, groups = heads_of_rank(shape, tensor)
    return [
        f"{plural(size, 'context-parallel rank')} cannot share {plural(heads, 'query head')} and {plural(groups, 'key-value head')}"
        f"{' of a tensor-parallel rank' if tensor > 1 else ''}, so they gather keys and values of all positions (--cp-comm-type all_gather)"
        for size in sorted({stage.context_parallel_size for stage in plan.stages})
        if gathers_keys(shape, tensor, size, None)
    ]


def _fitting(conditions: list[_Condition], data_parallel_size: int) -> str:
    """Returns the smallest sizes that fit."""
    found = [size for size in range(1, min(data_parallel_size, _LARGEST_SHOWN) + 1) if all(one.fits(size) for one in conditions)]
    more = ", …" if len(found) > _SHOWN else ""
    return ", ".join(map(str, found[:_SHOWN])) + more if found else "none with these ranks, this model and these samples"


def check_own_model(name: str, plan: StagePlan) -> None:
    """Checks that a model of the user's own that does not declare that it shares heads has all positions of its samples.

    Raises:
        ConfigError: a stage has context parallelism.
    """
    shared: Stage | None = next((stage for stage in plan.stages if stage.context_parallel_size > 1), None)
    if shared is not None:
        raise ConfigError(
            f"model={name} with {_given(shared.context_parallel_size, repr(shared.name))}, but it does not declare that its attention "
            "sees the positions of other ranks",
            "1, or a function whose attribute context_parallel is True, such as one that builds a GPTModel",
            f"set {name}.context_parallel = True if its forward pass takes a ContextParallel, or remove the context-parallel size",
        )


def _given(size: int, stage: str) -> str:
    return f"--context-parallel-size {size} in stage {stage}"
