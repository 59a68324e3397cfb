"""Merges the flags and the user's DeepSpeed JSON into one configuration.

In: engine and schedule options, the origin of each option, and the path of a user's JSON. Out: `EngineConfig`, whose `deepspeed` field
is passed to `deepspeed.initialize`. Keys that the program does not set pass through unchanged once `deepspeed_json` has checked them. If a
flag and the JSON set the same value differently, the error shows both. This file imports no torch, so that a dry run starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import EngineOptions, ScheduleOptions
from megatron_patch.engine.deepspeed_json import read_user_settings
from megatron_patch.engine.deepspeed_keys import HIGHEST_POWER
from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.registry import optimizer_type
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.utils.findings import Findings

Precision = Literal["fp32", "bf16", "fp16"]
_OFFLOADS = ("offload_optimizer", "offload_param")
_PREFETCH = "stage3_prefetch_bucket_size"
_COMMUNICATION_TYPE = "communication_data_type"
_REDUCTION = "gradient_allreduce_op"
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

    def require_device(self, kind: str) -> None:
        """Refuses settings that DeepSpeed computes on GPUs only.

        Args:
            kind: type of this rank's device, "cpu" or "cuda".

        Raises:
            ConfigError: the device is a CPU and a setting needs a GPU.
        """
        zero = self.deepspeed["zero_optimization"]
        found = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
        if kind == "cpu" and self.zero_level == 3 and found:
            raise ConfigError(
                f"--deepspeed_config sets {' and '.join(found)}, but the ranks run on CPUs, for which DeepSpeed has no quantization",
                "quantized communication on GPUs",
                f"remove {' and '.join(found)}, or run on GPUs",
            )


def batch_settings(stage: Stage, data_parallel_size: int) -> dict[str, int]:
    """Returns DeepSpeed's three batch sizes for a stage."""
    accumulation = stage.gradient_accumulation(data_parallel_size)
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": stage.micro_batch_size * accumulation * data_parallel_size,
    }


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(data.get(name) or {})


def _device(zero: Mapping[str, Any], part: str) -> str:
    """Returns the device that `offload_optimizer` or `offload_param` names: "none", "cpu" or "nvme"."""
    return str(_section(zero, part).get("device", "none"))


def _check_nvme(zero: Mapping[str, Any], zero_level: int, findings: Findings) -> None:
    """Checks settings of NVMe: under ZeRO 1 and 2 DeepSpeed silently uses the CPU, and it checks the path only with `assert`."""
    for part in _OFFLOADS:
        if _device(zero, part) != "nvme":
            continue
        if zero_level != 3:
            findings.add(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme with ZeRO {zero_level}",
                "nvme with ZeRO 3; with ZeRO 1 and 2 device cpu, for offload_optimizer only",
                "use --zero-stage 3, or device cpu",
            )
            continue
        path = zero[part].get("nvme_path")
        if not isinstance(path, str) or not path:
            findings.add(
                f"--deepspeed_config: zero_optimization.{part}.device is nvme, but nvme_path is {path!r}",
                "a folder on a local NVMe disk that no other job uses",
                f"set zero_optimization.{part}.nvme_path",
            )
    if _device(zero, "offload_param") == "nvme" and zero.get(_PREFETCH, 0) != 0:
        findings.add(
            f"--deepspeed_config: zero_optimization.{_PREFETCH} is {zero[_PREFETCH]!r} with offload_param on nvme: DeepSpeed's prefetch "
            "fails on weights that the forward and the backward pass use one right after the other",
            "0",
            f"remove {_PREFETCH}",
        )


def _communication_type(user: Mapping[str, Any]) -> str:
    """Returns the type in which gradients are summed over ranks: that of the JSON, else float32.

    DeepSpeed's own default is the type of the weights, which rounds gradients that were accumulated in float32, even on one rank.
    """
    return str(user.get(_COMMUNICATION_TYPE) or "fp32").lower()


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


class _Merger:
    """Decides between a flag and the user's JSON.

    Args:
        origins: which options the user gave.
    """

    def __init__(self, origins: Mapping[str, str]) -> None:
        self._origins = origins

    def merge(self, option: str, value: Any, key: str, json_value: Any) -> Any:
        """Returns the JSON's value if it has one, else the option's.

        Raises:
            ConfigError: the user gave the option and the JSON sets another value.
        """
        if json_value is None:
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


def _loss_scaling(options: EngineOptions, origins: Mapping[str, str], user: Mapping[str, Any]) -> dict[str, Any]:
    """Returns DeepSpeed's section fp16 for a run in float16."""
    merge, section = _Merger(origins).merge, _section(user, "fp16")
    power = max(0, round(options.initial_loss_scale).bit_length() - 1)
    power = merge("initial_loss_scale", power, "fp16.initial_scale_power (a power of 2)", section.get("initial_scale_power"))
    if not 0 <= power <= HIGHEST_POWER:
        in_file = "initial_scale_power" in section
        raise ConfigError(
            f"--deepspeed_config: fp16.initial_scale_power is {power}"
            if in_file
            else f"--initial-loss-scale {options.initial_loss_scale:g}",
            f"0 to {HIGHEST_POWER}" if in_file else f"from 1 to below {2.0 ** (HIGHEST_POWER + 1):.2g}",
            "remove it: the default is 2 to the power of 16, and DeepSpeed adapts it",
        )
    scale = merge("loss_scale", options.loss_scale or 0, "fp16.loss_scale", section.get("loss_scale"))
    return {"initial_scale_power": power, **section, "loss_scale": scale, "enabled": True}


def _check_batch_sizes(user: Mapping[str, Any], plan: StagePlan, data_parallel_size: int, findings: Findings) -> None:
    for key, value in batch_settings(plan.stages[0], data_parallel_size).items():
        if user.get(key, value) != value:
            findings.add(
                f"--deepspeed_config sets {key} = {user[key]!r}, but the first stage of the plan has {value}",
                "no batch sizes in the JSON: each stage has its own",
                f"remove {key}",
            )


def _check_flags(options: EngineOptions, precision: Precision, zero_level: int, findings: Findings) -> None:
    """Adds combinations of precision, ZeRO level and layout that DeepSpeed cannot run."""
    if precision == "fp16" and zero_level == 0:
        findings.add(
            "--fp16 with --zero-stage 0: float16 needs the float32 master weights that ZeRO 1 to 3 keep",
            "--fp16 with --zero-stage 1, 2 or 3; --bf16 with any",
            "use --zero-stage 1 (with one rank, nothing is sharded)",
        )
    if zero_level == 3 and options.expert_model_parallel_size > 1:
        findings.add(
            f"--zero-stage 3 with --expert-model-parallel-size {options.expert_model_parallel_size}: there DeepSpeed divides each weight "
            "among all data-parallel ranks, also those of experts that only some of them hold",
            "ZeRO 0, 1 or 2 with expert parallelism; ZeRO 3 without it, which divides the experts as well",
            "use --zero-stage 1, or --expert-model-parallel-size 1",
        )
    if zero_level > 1 and options.pipeline_model_parallel_size > 1:
        findings.add(
            f"--zero-stage {zero_level} with --pipeline-model-parallel-size {options.pipeline_model_parallel_size}: with a pipeline, "
            "DeepSpeed does not shard gradients or weights",
            "ZeRO 0 or 1 with a pipeline; ZeRO 2 or 3 without one, with tensor parallelism too",
            "use --zero-stage 1, or --pipeline-model-parallel-size 1",
        )
    if zero_level == 3 and options.compile:
        findings.add(
            "--compile with --zero-stage 3: DeepSpeed gathers weights inside the blocks, so torch.compile would compile each "
            "block again and again",
            "--compile with ZeRO 0 to 2, with tensor parallelism too; ZeRO 3 without --compile",
            "remove --compile, or use --zero-stage 2",
        )


def _check_file(user: Mapping[str, Any], options: EngineOptions, zero_level: int, findings: Findings) -> None:
    """Adds settings of the JSON that do not run with the ZeRO level and the layout."""
    zero = _section(user, "zero_optimization")
    offloads = [part for part in _OFFLOADS if _device(zero, part) != "none"]
    if offloads and (zero_level == 0 or ("offload_param" in offloads and zero_level < 3)):
        findings.add(
            f"--deepspeed_config uses {' and '.join(offloads)} with ZeRO {zero_level}",
            "offload_optimizer with ZeRO 1 to 3, offload_param with ZeRO 3",
            "use a higher --zero-stage, or remove the offload",
        )
    else:
        _check_nvme(zero, zero_level, findings)
    if zero_level > 1 and zero.get("reduce_scatter") is not False:
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if user.get(key, neutral) != neutral:
                findings.add(
                    f"--deepspeed_config sets {key} with ZeRO {zero_level}, where DeepSpeed's reduce-scatter does not have it",
                    f"{key} with ZeRO 0 and 1; it only changes when gradients are divided",
                    f"remove {key}",
                )
    if options.pipeline_model_parallel_size > 1:
        for name, on in (
            ("wall_clock_breakdown", user.get("wall_clock_breakdown")),
            ("flops_profiler", _section(user, "flops_profiler").get("enabled")),
        ):
            if on:
                findings.add(
                    f"--deepspeed_config turns on {name} with a pipeline, in which DeepSpeed's timers end the run",
                    f"{name} with --pipeline-model-parallel-size 1",
                    f"remove {name}; SAVE/metrics.jsonl has the times of every step",
                )
    autocast = _section(user, "torch_autocast")
    if autocast.get("enabled") and "dtype" not in autocast:
        findings.add(
            "--deepspeed_config turns on torch_autocast without a dtype: on GPUs that is float16, without loss scaling",
            '"dtype": "bfloat16"',
            'write "dtype": "bfloat16" into torch_autocast, or remove the section and use --bf16',
        )


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
        ConfigError: the optimizer is not registered, the JSON cannot be read or has wrong keys or values, a flag and the JSON contradict
            each other, or DeepSpeed cannot run the combination; the error states all problems at once.
    """
    optimizer_type(schedule.optimizer)  # refuses an unknown name
    path, merge = options.deepspeed_config, _Merger(origins).merge
    findings = Findings(f"in --deepspeed_config {path}" if path is not None else "in the flags", "--deepspeed_config: ")
    default_level = 1 if options.zero_stage is None else options.zero_stage
    settings = read_user_settings(path, default_level, findings)
    user, file_is_right = settings.values, not findings.errors
    zero = _section(user, "zero_optimization")
    level_in_file = zero.get("stage")
    zero_level = findings.attempt(lambda: merge("zero_stage", default_level, "zero_optimization.stage", level_in_file), default_level)
    precision: Precision = findings.attempt(lambda: _precision(options, origins, user), "fp32")
    clip_grad = findings.attempt(
        lambda: merge("clip_grad", schedule.clip_grad, "gradient_clipping", user.get("gradient_clipping")), schedule.clip_grad
    )
    nothing: dict[str, Any] = {}
    loss_scaling = findings.attempt(lambda: _loss_scaling(options, origins, user) if precision == "fp16" else nothing, nothing)
    _check_batch_sizes(user, plan, data_parallel_size, findings)
    if optimizer_type(schedule.optimizer).full_matrices and _section(user, "torch_autocast").get("enabled"):
        findings.add(
            f"--deepspeed_config turns on torch_autocast with --optimizer {schedule.optimizer}, a combination that is not supported",
            "torch_autocast with --optimizer adamw",
            "remove torch_autocast and use --bf16",
        )
    if file_is_right:
        _check_flags(options, precision, zero_level, findings)
        _check_file(user, options, zero_level, findings)
    findings.raise_all()
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
        merged["fp16"] = loss_scaling
    # DeepSpeed's throughput timer would synchronize with the GPU before and after every micro-batch.
    timers = _section(user, "timers")
    merged["timers"] = {**timers, "throughput": {"enabled": False, **_section(timers, "throughput")}}
    merged["data_types"] = {**_section(user, "data_types"), "grad_accum_dtype": "fp32"}
    notes = (*settings.notes, *_rounding_notes(merged[_COMMUNICATION_TYPE], user))
    return EngineConfig(precision, zero_level, float(clip_grad), merged, notes)
