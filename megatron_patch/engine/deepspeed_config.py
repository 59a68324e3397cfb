"""Merges the flags and the user's DeepSpeed JSON into one configuration.

In: engine and schedule options, the origin of each option, and the path of a user's JSON. Out: `EngineConfig`, whose `deepspeed` field
is passed to `deepspeed.initialize`. Keys that the program does not set pass through unchanged. If a flag and the JSON set the same
value differently, the error shows both. This file imports no torch, so that a dry run starts fast.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import EngineOptions, ScheduleOptions
from megatron_patch.engine.optimizer import optimizer_by_name
from megatron_patch.errors import ConfigError
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.utils.files import read_small, reason

_MOST_BYTES = 1 << 22
Precision = Literal["fp32", "bf16", "fp16"]
_OFFLOADS = ("offload_optimizer", "offload_param")
_PREFETCH = "stage3_prefetch_bucket_size"
_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_COMMUNICATION_TYPE = "communication_data_type"
_REDUCTION = "gradient_allreduce_op"
_CHECKED_KEYS = (
    "zero_optimization",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "optimizer",
    "scheduler",
    _COMMUNICATION_TYPE,
    _REDUCTION,
    *_BATCH_SIZES,
)
_LOW_PRECISION_STATES = (
    ("bf16", "bf16_master_weights_and_grads"),
    ("bf16", "bf16_optimizer_states"),
    ("fp16", "fp16_master_weights_and_grads"),
)
_TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the engine that depend on neither the model nor the stage.

    Args:
        precision: dtype of weights and activations; gradients accumulate in float32, and master weights are float32, in every precision.
        zero_level: the ZeRO level (0 to 3) that `--zero-stage` or the JSON sets.
        clip_grad: largest gradient norm; 0 turns clipping off.
        deepspeed: DeepSpeed's JSON without the batch sizes, which each stage sets.
        notes: choices of the user's JSON that round gradients below float32, for the console.
    """

    precision: Precision
    zero_level: int
    clip_grad: float
    deepspeed: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def communication_bytes(self) -> int:
        """Bytes of a gradient's element when data-parallel ranks sum it."""
        return _TYPE_BYTES[self.deepspeed[_COMMUNICATION_TYPE]]

    @property
    def sums_gradients(self) -> bool:
        """Whether DeepSpeed sums the gradients of data-parallel ranks instead of averaging them."""
        return bool(self.deepspeed.get(_REDUCTION) == "sum")

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state is in host memory or on NVMe, and the optimizer steps on the CPU."""
        return _device(self.deepspeed["zero_optimization"], "offload_optimizer") != "none"

    @property
    def offloads_to_nvme(self) -> bool:
        """Whether weights or the optimizer's state are on NVMe between steps."""
        return any(_device(self.deepspeed["zero_optimization"], part) == "nvme" for part in _OFFLOADS)


def batch_settings(stage: Stage, data_parallel_size: int) -> dict[str, int]:
    """Returns DeepSpeed's three batch sizes for a stage."""
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
        data = json.loads(read_small(path, _MOST_BYTES, wait=True))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: {reason(error)}", "a readable JSON file", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path} is not valid JSON: {error}", "a JSON object", "correct the file") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--deepspeed_config {path} contains a {type(data).__name__}", "a JSON object", "correct the file")
    return data


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"--deepspeed_config: {name} is {section!r}", "a JSON object", f"correct {name}")
    if "enabled" in section and section["enabled"] not in (True, False, "auto"):
        raise ConfigError(f"--deepspeed_config: {name}.enabled is {section['enabled']!r}", 'true, false or "auto"', "use one of them")
    return dict(section)


def _device(zero: Mapping[str, Any], part: str) -> str:
    """Returns the device that `offload_optimizer` or `offload_param` names: "none", "cpu" or "nvme"."""
    section = {} if zero.get(part) is None else _section(zero, part)
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f"--deepspeed_config: zero_optimization.{part}.device is {device!r}", "none, cpu or nvme", "use one of them")
    return str(device)


def _check_nvme(zero: Mapping[str, Any], zero_level: int) -> None:
    """Checks settings of NVMe: under ZeRO 1 and 2 DeepSpeed silently uses the CPU, and it checks the path only with `assert`."""
    for part in _OFFLOADS:
        if _device(zero, part) != "nvme":
            continue
        if zero_level != 3:
            raise ConfigError(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme with ZeRO {zero_level}",
                "nvme with ZeRO 3; with ZeRO 1 and 2 device cpu, for offload_optimizer only",
                "use --zero-stage 3, or device cpu",
            )
        path = zero[part].get("nvme_path")
        if not isinstance(path, str) or not path:
            raise ConfigError(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme, but nvme_path is {path!r}",
                "a folder on a local NVMe disk that no other job uses",
                f"set zero_optimization.{part}.nvme_path",
            )
    if _device(zero, "offload_param") == "nvme" and zero.get(_PREFETCH, 0) != 0:
        raise ConfigError(
            f"--deepspeed_config: zero_optimization.{_PREFETCH} is {zero[_PREFETCH]!r} with offload_param on nvme: DeepSpeed's prefetch "
            "fails on weights that the forward and the backward pass use one right after the other",
            "0",
            f"remove {_PREFETCH}",
        )


def _communication_type(user: Mapping[str, Any]) -> str:
    """Returns the type in which gradients are summed over ranks: that of the JSON, else float32.

    DeepSpeed's own default is the type of the weights, which rounds gradients that were accumulated in float32, even on one rank.
    """
    value = user.get(_COMMUNICATION_TYPE)
    value = "fp32" if value in (None, "auto") else value
    if not isinstance(value, str) or value.lower() not in _TYPE_BYTES:
        raise ConfigError(
            f"--deepspeed_config: {_COMMUNICATION_TYPE} is {value!r}",
            "fp32, which is the default and rounds nothing, bf16 or fp16",
            f"remove {_COMMUNICATION_TYPE}, or use one of them",
        )
    return value.lower()


def _check_float32_states(user: Mapping[str, Any]) -> None:
    """Refuses settings with which gradients, master weights or moments would not be float32, or gradients not be averaged."""
    types = _section(user, "data_types")
    if types.get("grad_accum_dtype") not in (None, "auto", "fp32"):
        raise ConfigError(
            f"--deepspeed_config: data_types.grad_accum_dtype is {types['grad_accum_dtype']!r}",
            "fp32",
            "remove data_types.grad_accum_dtype",
        )
    for section, key in _LOW_PRECISION_STATES:
        if _section(user, section).get(key) not in (None, False):
            raise ConfigError(
                f"--deepspeed_config sets {section}.{key}",
                "float32 master weights, gradients and optimizer states in every precision, which checkpoints rely on",
                f"remove {section}.{key}",
            )
    if user.get(_REDUCTION, "mean") != "mean":
        raise ConfigError(
            f"--deepspeed_config: {_REDUCTION} is {user[_REDUCTION]!r}, which would scale the gradient by the number of ranks",
            "no value: the gradient is the mean over the labels of the global batch",
            f"remove {_REDUCTION}",
        )


def _rounding_notes(communication_type: str, user: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a note for each setting of the user's JSON that rounds gradients below float32 on their way to the optimizer."""
    notes = []
    if communication_type != "fp32":
        notes.append(
            f"gradients are summed over ranks in {communication_type} (--deepspeed_config: {_COMMUNICATION_TYPE}), which rounds them once "
            "more; the default is fp32"
        )
    if _section(user, "torch_autocast").get("enabled"):
        notes.append("gradients of matrices are summed over ranks in the type of --deepspeed_config's torch_autocast, which rounds them")
    if _section(user, "zero_optimization").get("zero_quantized_gradients"):
        notes.append("gradients are quantized when ranks sum them (--deepspeed_config: zero_quantized_gradients)")
    return tuple(notes)


def _check_names(user: Mapping[str, Any]) -> None:
    """Refuses misspelled names of important keys, because DeepSpeed ignores keys that it does not know."""
    for key in user:
        close = difflib.get_close_matches(key, _CHECKED_KEYS, n=1, cutoff=0.8)
        if key not in _CHECKED_KEYS and (close or key == "bfloat16"):
            name = close[0] if close else "bf16"
            raise ConfigError(f"--deepspeed_config: unknown key {key!r}", f"the name that DeepSpeed uses, {name}", f"rename it to {name}")


class _Merger:
    """Decides between a flag and the user's JSON.

    Args:
        origins: which options the user gave.
    """

    def __init__(self, origins: Mapping[str, str]) -> None:
        self._origins = origins

    def merge(self, option: str, value: Any, key: str, json_value: Any) -> Any:
        """Returns the JSON's value if it has one ("auto" counts as none), else the option's.

        Raises:
            ConfigError: the user gave the option and the JSON sets another value.
        """
        if json_value is None or json_value == "auto":
            return value
        if option in self._origins and value != json_value:
            raise ConfigError(
                f"{flag_of(option)} is {value!r}, but --deepspeed_config sets {key} = {json_value!r}",
                "a value in one of the two, or the same value in both",
                "remove one of them",
            )
        return json_value


def _precision(options: EngineOptions, origins: Mapping[str, str], user: Mapping[str, Any]) -> Precision:
    merge = _Merger(origins).merge
    bf16 = merge("bf16", options.bf16, "bf16.enabled", _section(user, "bf16").get("enabled"))
    fp16 = merge("fp16", options.fp16, "fp16.enabled", _section(user, "fp16").get("enabled"))
    if bf16 and fp16:
        raise ConfigError("the flags and --deepspeed_config together turn on both bf16 and fp16", "one of them", "remove one")
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def resolve_engine_config(
    options: EngineOptions, schedule: ScheduleOptions, origins: Mapping[str, str], plan: StagePlan, data_parallel_size: int
) -> EngineConfig:
    """Merges the flags and the user's JSON.

    Args:
        options: engine options.
        schedule: learning rate and optimizer options.
        origins: name of each option that the user gave -> where.
        plan: the stage plan, for the batch sizes, which the JSON may repeat but not contradict.
        data_parallel_size: number of ranks that share a global batch.

    Raises:
        ConfigError: the optimizer is not registered, the JSON cannot be read, a flag and the JSON contradict each other, or DeepSpeed
            cannot run the combination.
    """
    optimizer_by_name(schedule.optimizer)  # refuses an unknown name
    user = _read(options.deepspeed_config)
    _check_names(user)
    _check_float32_states(user)
    merge = _Merger(origins).merge
    for key in ("optimizer", "scheduler"):
        if key in user:
            raise ConfigError(
                f"--deepspeed_config sets {key!r}",
                "the program's own flags for optimizer and learning rate",
                f"remove {key}; use --optimizer, --lr, --lr-decay-style, --weight-decay, --adam-beta1 …",
            )
    for key, value in batch_settings(plan.stages[0], data_parallel_size).items():
        if user.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"--deepspeed_config sets {key} = {user[key]!r}, but the first stage of the plan has {value}",
                "no batch sizes in the JSON: each stage has its own",
                f"remove {key}",
            )
    precision = _precision(options, origins, user)
    zero = _section(user, "zero_optimization")
    zero_level = merge("zero_stage", options.zero_stage, "zero_optimization.stage", zero.get("stage"))
    zero_level = 1 if zero_level is None else zero_level
    if zero_level not in (0, 1, 2, 3) or isinstance(zero_level, bool):
        raise ConfigError(f"--deepspeed_config: zero_optimization.stage is {zero_level!r}", "0, 1, 2 or 3", "use one of them")
    clip_grad = merge("clip_grad", schedule.clip_grad, "gradient_clipping", user.get("gradient_clipping"))
    if isinstance(clip_grad, bool) or not isinstance(clip_grad, (int, float)) or not 0 <= clip_grad < float("inf"):
        raise ConfigError(f"--deepspeed_config: gradient_clipping is {clip_grad!r}", "numbers from 0", "use 0 to turn clipping off")
    if precision == "fp16" and zero_level == 0:
        raise ConfigError(
            "--fp16 with --zero-stage 0: float16 needs the float32 master weights that ZeRO 1 to 3 keep",
            "--fp16 with --zero-stage 1, 2 or 3; --bf16 with any",
            "use --zero-stage 1 (with one rank, nothing is sharded)",
        )
    if zero_level > 1 and options.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"--zero-stage {zero_level} with --pipeline-model-parallel-size {options.pipeline_model_parallel_size}: with a pipeline, "
            "DeepSpeed does not shard gradients or weights",
            "ZeRO 0 or 1 with a pipeline; ZeRO 2 or 3 without one, with tensor parallelism too",
            "use --zero-stage 1, or --pipeline-model-parallel-size 1",
        )
    if zero_level == 3 and options.compile:
        raise ConfigError(
            "--compile with --zero-stage 3: DeepSpeed gathers weights inside the blocks, so torch.compile would compile each "
            "block again and again",
            "--compile with ZeRO 0 to 2, with tensor parallelism too; ZeRO 3 without --compile",
            "remove --compile, or use --zero-stage 2",
        )
    offloads = [part for part in _OFFLOADS if _device(zero, part) != "none"]
    if offloads and (zero_level == 0 or ("offload_param" in offloads and zero_level < 3)):
        raise ConfigError(
            f"--deepspeed_config uses {' and '.join(offloads)} with ZeRO {zero_level}",
            "offload_optimizer with ZeRO 1 to 3, offload_param with ZeRO 3",
            "use a higher --zero-stage, or remove the offload",
        )
    _check_nvme(zero, zero_level)
    merged: dict[str, Any] = {key: value for key, value in user.items() if key not in ("bf16", "fp16", _REDUCTION)}
    merged.update(
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        gradient_clipping=float(clip_grad),
        steps_per_print=merged.get("steps_per_print", 2**62),
        communication_data_type=_communication_type(user),
        zero_optimization={**zero, "stage": zero_level, **({_PREFETCH: 0} if _device(zero, "offload_param") == "nvme" else {})},
    )
    if zero_level == 2 and data_parallel_size & (data_parallel_size - 1):
        # ZeRO 2 divides gradients by the number of ranks while they have the type of the weights, which is exact for powers of two only.
        # Without the division, the engine scales the loss.
        merged[_REDUCTION] = "sum"
    if precision == "bf16" and zero_level > 0:
        # Adds each gradient to its float32 sum as soon as the backward pass has computed it, with the same result as DeepSpeed's default,
        # which reads and writes all gradients once more after the pass. Only ZeRO 1 without offload reads this; ZeRO 2 and 3 add
        # gradients when they are reduced, and ZeRO 0 has float32 weights.
        merged["bf16"] = {"immediate_grad_update": True, **_section(user, "bf16"), "enabled": True}
    if precision == "fp16":
        merged["fp16"] = {
            "loss_scale": options.loss_scale or 0,
            "initial_scale_power": max(0, round(options.initial_loss_scale).bit_length() - 1),
            **_section(user, "fp16"),
            "enabled": True,
        }
    # DeepSpeed's throughput timer would synchronize with the GPU before and after every micro-batch.
    timers = _section(user, "timers")
    merged["timers"] = {**timers, "throughput": {"enabled": False, **_section(timers, "throughput")}}
    merged["data_types"] = {**_section(user, "data_types"), "grad_accum_dtype": "fp32"}
    notes = _rounding_notes(merged[_COMMUNICATION_TYPE], user)
    return EngineConfig(precision, zero_level, float(clip_grad), merged, notes)
