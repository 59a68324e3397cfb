"""DeepSpeed's JSON: what the flags say, joined with the user's own file.

In: engine and schedule options, where they came from, and the path of a user's JSON. Out: `EngineConfig`, whose `deepspeed` part is
handed to `deepspeed.initialize`. Keys that the program does not set pass through; what both set must agree, or the run ends with both
values. No torch here, so a dry run can print it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_patch.config.options import EngineOptions, ScheduleOptions
from megatron_patch.engine.optimizer import check_optimizer_name
from megatron_patch.errors import ConfigError
from megatron_patch.stages import Stage, StagePlan

Precision = Literal["fp32", "bf16", "fp16"]
_OFFLOADS = ("offload_optimizer", "offload_param")
_PREFETCH = "stage3_prefetch_bucket_size"
_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_DECISIVE = ("zero_optimization", "gradient_clipping", "bf16", "fp16", "data_types", "optimizer", "scheduler", *_BATCH_SIZES)


@dataclass(frozen=True)
class EngineConfig:
    """What the engine needs to know beside model and plan.

    Args:
        precision: of weights and activations; gradients accumulate in float32 and master weights are float32 in all of them.
        zero_stage: what ZeRO shards.
        clip_grad: largest gradient norm; 0: no clipping.
        deepspeed: DeepSpeed's JSON without the batch sizes, which belong to the stage.
    """

    precision: Precision
    zero_stage: int
    clip_grad: float
    deepspeed: Mapping[str, Any]

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer steps in host memory."""
        return _device(self.deepspeed["zero_optimization"], "offload_optimizer") != "none"

    @property
    def offloads_to_nvme(self) -> bool:
        """Whether weights or optimizer are on NVMe between steps."""
        return any(_device(self.deepspeed["zero_optimization"], part) == "nvme" for part in _OFFLOADS)


def batch_settings(stage: Stage, data_parallel_size: int) -> dict[str, int]:
    """DeepSpeed's three batch sizes for a stage."""
    accumulation = stage.gradient_accumulation(data_parallel_size)
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": stage.micro_batch_size * accumulation * data_parallel_size,
    }


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: {error.strerror}", "a readable JSON file", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path} is not valid JSON: {error}", "a JSON object") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--deepspeed_config {path} holds a {type(data).__name__}", "a JSON object")
    return data


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"--deepspeed_config: {name} is {section!r}", "a JSON object")
    if "enabled" in section and section["enabled"] not in (True, False, "auto"):
        raise ConfigError(f"--deepspeed_config: {name}.enabled is {section['enabled']!r}", 'true, false or "auto"')
    return dict(section)


def _device(zero: Mapping[str, Any], part: str) -> str:
    """Where a part of the training's state is offloaded to."""
    section = {} if zero.get(part) is None else _section(zero, part)
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f"--deepspeed_config: zero_optimization.{part}.device is {device!r}", "none, cpu or nvme", "use cpu")
    return str(device)


def _check_nvme(zero: Mapping[str, Any], stage: int) -> None:
    """DeepSpeed takes nvme for cpu under ZeRO 1 and 2, and looks at the path by bare assertions."""
    for part in _OFFLOADS:
        if _device(zero, part) != "nvme":
            continue
        if stage != 3:
            raise ConfigError(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme with ZeRO stage {stage}",
                "nvme with ZeRO 3; cpu with ZeRO 1 and 2, for the optimizer",
                "use --zero-stage 3, or device cpu",
            )
        path = zero[part].get("nvme_path")
        if not isinstance(path, str) or not path:
            raise ConfigError(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme, and its nvme_path is {path!r}",
                "a folder on a local NVMe disk, which no other job uses",
                'set "nvme_path"',
            )
    if _device(zero, "offload_param") == "nvme" and zero.get(_PREFETCH, 0) != 0:
        raise ConfigError(
            f"--deepspeed_config: zero_optimization.{_PREFETCH} is {zero[_PREFETCH]!r} with offload_param on nvme: DeepSpeed's prefetch "
            "stops at weights that it needs twice in a row, forward and backward",
            "0",
            f"remove {_PREFETCH}",
        )


def _check_names(user: Mapping[str, Any]) -> None:
    """DeepSpeed passes over what it does not know: a slip in a name that decides something must not pass."""
    for key in user:
        close = difflib.get_close_matches(key, _DECISIVE, n=1, cutoff=0.8)
        if key not in _DECISIVE and (close or key == "bfloat16"):
            name = close[0] if close else "bf16"
            raise ConfigError(f"--deepspeed_config: unknown key {key!r}", f"{name}, as DeepSpeed spells it", f"write {name}")


class _Agreement:
    """Settles one value between a flag and the user's JSON."""

    def __init__(self, origins: Mapping[str, str]) -> None:
        self._origins = origins

    def settle(self, option: str, value: Any, key: str, theirs: Any) -> Any:
        """The flag's value where the flag was given or the JSON is silent ("auto" is silence), else the JSON's."""
        if theirs is None or theirs == "auto":
            return value
        if option in self._origins and value != theirs:
            raise ConfigError(
                f"--{option.replace('_', '-')} says {value!r} and --deepspeed_config says {key} = {theirs!r}",
                "one value, or the same in both",
                "remove one of them",
            )
        return theirs


def _precision(options: EngineOptions, origins: Mapping[str, str], user: Mapping[str, Any]) -> Precision:
    settle = _Agreement(origins).settle
    bf16 = settle("bf16", options.bf16, "bf16.enabled", _section(user, "bf16").get("enabled"))
    fp16 = settle("fp16", options.fp16, "fp16.enabled", _section(user, "fp16").get("enabled"))
    if bf16 and fp16:
        raise ConfigError("bf16 and fp16 are both switched on by flags and --deepspeed_config", "one of them", "remove one")
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def engine_config(
    options: EngineOptions, schedule: ScheduleOptions, origins: Mapping[str, str], plan: StagePlan, data_parallel_size: int
) -> EngineConfig:
    """Joins flags and the user's JSON.

    Args:
        options: engine flags.
        schedule: optimizer flags.
        origins: which options were given, and where.
        plan: for the batch sizes, which the JSON may repeat but not contradict.
        data_parallel_size: ranks that share a global batch.

    Raises:
        ConfigError: unreadable JSON, a contradiction, or a combination that DeepSpeed cannot run.
    """
    check_optimizer_name(schedule.optimizer)
    user = _read(options.deepspeed_config)
    _check_names(user)
    settle = _Agreement(origins).settle
    for key in ("optimizer", "scheduler"):
        if key in user:
            raise ConfigError(
                f"--deepspeed_config sets {key!r}",
                "the program's own flags for it",
                "use --lr, --lr-decay-style, --weight-decay, --adam-beta1 …",
            )
    for key, value in batch_settings(plan.stages[0], data_parallel_size).items():
        if user.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"--deepspeed_config says {key} = {user[key]!r}, the first stage of the plan {value}",
                "no batch sizes there, as each stage has its own",
                f"remove {key}",
            )
    precision = _precision(options, origins, user)
    zero = _section(user, "zero_optimization")
    stage = settle("zero_stage", options.zero_stage, "zero_optimization.stage", zero.get("stage"))
    stage = 1 if stage is None else stage
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"zero_optimization.stage = {stage!r}", "0, 1, 2 or 3")
    clip_grad = settle("clip_grad", schedule.clip_grad, "gradient_clipping", user.get("gradient_clipping"))
    if isinstance(clip_grad, bool) or not isinstance(clip_grad, (int, float)) or not 0 <= clip_grad < float("inf"):
        raise ConfigError(f"--deepspeed_config: gradient_clipping is {clip_grad!r}", "numbers from 0")
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "--fp16 with --zero-stage 0: there are no sharded master weights to scale the loss for",
            "--zero-stage 1, 2 or 3, or --bf16",
            "use --zero-stage 1; on one rank it is the same",
        )
    if stage > 1 and options.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"--zero-stage {stage} with --pipeline-model-parallel-size {options.pipeline_model_parallel_size}: DeepSpeed's pipelines keep "
            "whole gradients and weights of their layers",
            "ZeRO 0 or 1 with a pipeline; ZeRO 2 or 3 without one, with tensor parallelism too",
            "use --zero-stage 1, or --pipeline-model-parallel-size 1",
        )
    if stage == 3 and options.compile:
        raise ConfigError(
            "--compile with --zero-stage 3: DeepSpeed gathers weights inside the blocks, where they would be compiled again and again",
            "--compile with ZeRO 0 to 2, with tensor parallelism too; ZeRO 3 without it",
            "leave --compile out, or use --zero-stage 2",
        )
    offloads = [part for part in _OFFLOADS if _device(zero, part) != "none"]
    if offloads and (stage == 0 or ("offload_param" in offloads and stage < 3)):
        raise ConfigError(
            f"--deepspeed_config offloads {' and '.join(offloads)} with ZeRO stage {stage}",
            "offload_optimizer with ZeRO 1 to 3, offload_param with ZeRO 3",
            "raise --zero-stage",
        )
    _check_nvme(zero, stage)
    merged: dict[str, Any] = {key: value for key, value in user.items() if key not in ("bf16", "fp16")}
    merged.update(
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        gradient_clipping=float(clip_grad),
        steps_per_print=merged.get("steps_per_print", 2**62),
        zero_optimization={**zero, "stage": stage, **({_PREFETCH: 0} if _device(zero, "offload_param") == "nvme" else {})},
    )
    if precision == "bf16" and stage > 0:
        merged["bf16"] = {**_section(user, "bf16"), "enabled": True}
    if precision == "fp16":
        merged["fp16"] = {
            "loss_scale": options.loss_scale or 0,
            "initial_scale_power": max(0, round(options.initial_loss_scale).bit_length() - 1),
            **_section(user, "fp16"),
            "enabled": True,
        }
    # DeepSpeed's meter of samples a second would wait for the GPU before and behind every micro-batch.
    timers = _section(user, "timers")
    merged["timers"] = {**timers, "throughput": {"enabled": False, **_section(timers, "throughput")}}
    types = _section(user, "data_types")
    if types.get("grad_accum_dtype") not in (None, "auto", "fp32"):
        raise ConfigError(f"--deepspeed_config says data_types.grad_accum_dtype = {types['grad_accum_dtype']!r}", "fp32", "remove it")
    merged["data_types"] = {**types, "grad_accum_dtype": "fp32"}
    return EngineConfig(precision, stage, float(clip_grad), merged)
