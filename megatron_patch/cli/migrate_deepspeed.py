"""Divides a DeepSpeed JSON of Megatron-DeepSpeed: what becomes flags of this program, what may stay in a JSON, what has no place here.

In: the JSON. Out: `DeepSpeedParts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.engine.deepspeed_keys import HIGHEST_POWER, REFUSED

DEEPSPEEDS_JSON = "DeepSpeed's JSON"
"""The source of flags that come from it."""
_IGNORED = {
    "steps_per_print": "the program prints its own lines (--log-interval)",
    "wall_clock_breakdown": "the program has timers of its own",
    "zero_allow_untested_optimizer": "always on",
    "zero_force_ds_cpu_optimizer": "always off",
    "gradient_accumulation_steps": "follows from the batch sizes and the number of ranks",
    "dump_state": "the plan is printed at the start",
}
_DEFAULTS = {"prescale_gradients": False, "gradient_predivide_factor": 1}


@dataclass
class DeepSpeedParts:
    """The parts of a JSON.

    Args:
        flags: option with dashes -> (value, key of the JSON).
        steps: option that counts tokens -> (steps of the JSON, key).
        left: what stays in a JSON.
        dropped: keys that the program does not have, with the reason.
        ignored: keys that change nothing, with the reason.
        remarks: where what is taken over differs from what DeepSpeed computes.
        accumulation: micro-batches of a rank in a step that the JSON asks for, if more than one.
    """

    flags: dict[str, tuple[str, str]] = field(default_factory=dict)
    steps: dict[str, tuple[int, str]] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    accumulation: int | None = None


def divide(data: Mapping[str, Any]) -> DeepSpeedParts:
    """Returns the parts of a DeepSpeed JSON."""
    parts = DeepSpeedParts()
    for key, value in data.items():
        if key in _FUNCTIONS and (isinstance(value, dict) or key in _VALUES):
            _FUNCTIONS[key](parts, value)
        elif key in _IGNORED:
            if key == "gradient_accumulation_steps" and isinstance(value, int) and value > 1:
                parts.accumulation = value
            parts.ignored.append((key, _IGNORED[key]))
        elif key in REFUSED:
            if value not in (False, None) and not (isinstance(value, dict) and value.get("enabled") is False):
                instead = REFUSED[key].do.removeprefix("remove it").removeprefix("; ")
                parts.dropped.append((key, "; ".join(part for part in (REFUSED[key].why, instead) if part)))
        elif key not in _DEFAULTS or value != _DEFAULTS[key]:
            parts.left[key] = value
    return parts


def _take(parts: DeepSpeedParts, option: str, value: Any, key: str) -> None:
    if value is not None and value != "auto":
        parts.flags[option] = (str(value).lower() if isinstance(value, bool) else f"{value}", key)


def _zero(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    _take(parts, "zero-stage", section.get("stage"), "zero_optimization.stage")
    rest = {key: value for key, value in section.items() if key != "stage"}
    if rest:
        parts.left["zero_optimization"] = rest


def _bf16(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    if section.get("enabled") is True:
        _take(parts, "bf16", True, "bf16.enabled")
    rest = {key: value for key, value in section.items() if key != "enabled"}
    if rest:
        parts.left["bf16"] = rest


def _fp16(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    if section.get("enabled") is not True:
        return
    _take(parts, "fp16", True, "fp16.enabled")
    if section.get("loss_scale"):
        _take(parts, "loss-scale", section["loss_scale"], "fp16.loss_scale")
    power = section.get("initial_scale_power")
    if isinstance(power, int) and 0 <= power <= HIGHEST_POWER:  # any other stays in the JSON, whose check refuses it
        _take(parts, "initial-loss-scale", 2**power, "fp16.initial_scale_power")
        section = {key: value for key, value in section.items() if key != "initial_scale_power"}
    defaults = {"loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    known = ("enabled", "loss_scale", "auto_cast")
    rest = {key: value for key, value in section.items() if key not in known and defaults.get(key) != value}
    if rest:
        parts.left["fp16"] = rest


def _data_types(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    kind = section.get("grad_accum_dtype")
    if kind not in (None, "fp32"):
        parts.dropped.append((f"data_types.grad_accum_dtype {kind}", "gradients are accumulated in float32"))


def _optimizer(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    name, values = str(section.get("type", "")), dict(section.get("params") or {})
    if name.lower() == "muon":
        _muon(parts, values)
    elif name.lower() not in ("adam", "adamw", "fusedadam"):
        parts.dropped.append((f"optimizer.type {name}", "the optimizer is AdamW or Muon"))
        return
    if values.get("adam_w_mode") is False:
        parts.dropped.append(("optimizer.params.adam_w_mode false", "weight decay is decoupled"))
    for key, option in (("lr", "lr"), ("eps", "adam-eps"), ("weight_decay", "weight-decay")):
        _take(parts, option, values.get(key), f"optimizer.params.{key}")
    betas = values.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        _take(parts, "adam-beta1", betas[0], "optimizer.params.betas")
        _take(parts, "adam-beta2", betas[1], "optimizer.params.betas")


def _muon(parts: DeepSpeedParts, values: dict[str, Any]) -> None:
    """Takes over the parameters of DeepSpeed's Muon, whose update has Jordan's coefficients and scale (`original_muon.py`)."""
    key = "optimizer.type Muon"
    for option, value in (("optimizer", "muon"), ("muon-scale-mode", "shape_scaling"), ("muon-extra-scale-factor", "1.0")):
        _take(parts, option, value, key)
    _take(parts, "muon-momentum", values.get("momentum", 0.95), "optimizer.params.momentum")
    _take(parts, "muon-nesterov", True, key)
    _take(parts, "muon-coefficient-type", "simple", key)
    _take(
        parts,
        "muon-lr",
        values.get("muon_lr", values.get("lr")),
        "optimizer.params.muon_lr" if "muon_lr" in values else "optimizer.params.lr",
    )
    values["lr"] = values.get("adam_lr", values.get("lr"))
    values.setdefault("weight_decay", 0.0)
    if values.get("per_head_muon"):
        parts.dropped.append(("optimizer.params.per_head_muon", "query, key and value projections are orthogonalized as whole matrices"))
    if "ns_method" in values:
        parts.ignored.append((f"optimizer.params.ns_method {values['ns_method']}", "two ways to compute the same"))
    parts.remarks.append(
        "DeepSpeed's Muon orthogonalizes fused projections as one matrix (query, key and value; gate and up) and clips what it has "
        "orthogonalized; here each projection is orthogonalized by itself, of gradients that are clipped"
    )


def _scheduler(parts: DeepSpeedParts, section: dict[str, Any]) -> None:
    name, values = str(section.get("type", "")), section.get("params") or {}
    styles = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if name not in styles:
        parts.dropped.append((f"scheduler.type {name}", "the schedule is --lr-decay-style"))
        return
    _take(parts, "lr-decay-style", styles[name], "scheduler.type")
    _take(parts, "lr", values.get("warmup_max_lr"), "scheduler.params.warmup_max_lr")
    if values.get("warmup_min_lr") not in (None, 0, "auto"):
        parts.dropped.append((f"scheduler.params.warmup_min_lr {values['warmup_min_lr']}", "the warm-up begins at 0"))
    if name != "WarmupCosineLR" and values.get("warmup_type", "log") == "log":
        parts.dropped.append(("scheduler.params.warmup_type log", "the warm-up is linear"))
    if isinstance(values.get("warmup_num_steps"), int):
        _take(parts, "lr-warmup-steps", values["warmup_num_steps"], "scheduler.params.warmup_num_steps")
    if isinstance(values.get("total_num_steps"), int):
        parts.steps["lr-decay-tokens"] = (values["total_num_steps"], "scheduler.params.total_num_steps")
    if name == "WarmupCosineLR" and "cos_min_ratio" in values:
        parts.dropped.append((f"scheduler.params.cos_min_ratio {values['cos_min_ratio']}", "write --min-lr, which is this share of --lr"))


_VALUES = ("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
_FUNCTIONS = {
    "zero_optimization": _zero,
    "bf16": _bf16,
    "bfloat16": _bf16,
    "fp16": _fp16,
    "data_types": _data_types,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "gradient_clipping": lambda parts, value: _take(parts, "clip-grad", value, "gradient_clipping"),
    "train_batch_size": lambda parts, value: _take(parts, "global-batch-size", value, "train_batch_size"),
    "train_micro_batch_size_per_gpu": lambda parts, value: _take(parts, "micro-batch-size", value, "train_micro_batch_size_per_gpu"),
}
