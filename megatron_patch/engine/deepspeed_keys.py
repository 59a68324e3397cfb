"""What a DeepSpeed JSON may say in this program: the keys that have an effect, and those that are refused, each with its reason.

Out: tables. DeepSpeed checks only some sections by classes of its own (`CLASSES`). It reads the others as plain dictionaries, in which any
key passes unnoticed; their keys are listed here, and `tests/engine/test_deepspeed_json.py` compares them with what DeepSpeed reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        allowed: the values, for messages.
        accepts: whether a value is one of them.
        whole: whether a number without a fraction, such as 5e8, stands for a whole number.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    whole: bool = False


def _words(*words: str) -> Kind:
    return Kind(", ".join(words), lambda value: isinstance(value, str) and value.lower() in words)


SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("whole numbers", _whole, whole=True)
COUNT = Kind("whole numbers from 1", lambda value: _whole(value) and value >= 1, whole=True)
COUNT_OR_NULL = Kind("whole numbers from 1, or null", lambda value: value is None or COUNT.accepts(value), whole=True)
NUMBER = Kind("numbers from 0", lambda value: not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < float("inf"))
TEXT_OR_NULL = Kind("a text, or null", lambda value: value is None or isinstance(value, str))
ONLY_TRUE = Kind("true", lambda value: value is True)
ONLY_FALSE = Kind("false", lambda value: value is False)

CLASSES: Mapping[str, tuple[str, str]] = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "timers.throughput": ("deepspeed.utils.config", "DeepSpeedThroughputTimerConfig"),
}
"""Sections that DeepSpeed checks by a class: path -> (module, class)."""

PLAIN: Mapping[str, Mapping[str, Kind]] = {
    "flops_profiler": {
        "enabled": SWITCH,
        "recompute_fwd_factor": NUMBER,
        "profile_step": COUNT,
        "module_depth": WHOLE,
        "top_modules": COUNT,
        "detailed": SWITCH,
        "output_file": TEXT_OR_NULL,
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": ONLY_FALSE,
    },
    "torch_autocast": {
        "enabled": SWITCH,
        "dtype": Kind("bfloat16", lambda value: value in ("bfloat16", "bf16", "torch.bfloat16")),
    },
    "data_types": {"grad_accum_dtype": Kind("fp32 or null", lambda value: value is None or value == "fp32")},
    "timers": {},
}
"""Sections that DeepSpeed reads as plain dictionaries: section -> key -> kind of value."""

VALUES: Mapping[str, Kind] = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NUMBER,
    "communication_data_type": Kind(
        "fp32, bf16, fp16 or null", lambda value: value is None or _words("fp32", "bf16", "fp16").accepts(value)
    ),
    "gradient_allreduce_op": Kind('"mean"', lambda value: isinstance(value, str) and value.lower() == "mean"),
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": Kind("numbers above 0", lambda value: NUMBER.accepts(value) and value > 0),
    "steps_per_print": COUNT_OR_NULL,
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "disable_python_gc": SWITCH,
    "log_level": _words("debug", "info", "warning", "error", "critical"),
    "managed_gradient_accumulation": ONLY_TRUE,
    "zero_allow_untested_optimizer": ONLY_TRUE,
    "zero_force_ds_cpu_optimizer": ONLY_FALSE,
}
"""Keys outside of sections: key -> kind of value."""


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused, and what to do in its place."""

    why: str
    do: str


@dataclass(frozen=True)
class Fixed:
    """The only possible value of a key, why, and what to do about another one."""

    value: Any
    why: str
    do: str = "remove it"


def _removed(what: str, do: str = "remove it") -> Refusal:
    return Refusal(f"DeepSpeed no longer has {what}", do)


_OWN_LOG = "DeepSpeed would log the loss of one micro-batch, divided by the labels of the global batch"
_OWN_CHECKPOINTS = "the program writes and reads its own checkpoints"

REFUSED: Mapping[str, Refusal] = {
    "optimizer": Refusal(
        "the program makes the optimizer",
        "remove it; use --optimizer (adamw or muon), --lr, --weight-decay, --adam-beta1, --adam-beta2, --adam-eps, and for Muon --muon-lr "
        "and --muon-momentum; megatron-patch migrate translates it",
    ),
    "scheduler": Refusal(
        "the program sets the learning rate", "remove it; use --lr, --min-lr, --lr-decay-style, --lr-warmup-steps, --lr-decay-steps"
    ),
    "bfloat16": Refusal("it is the old name of bf16", "rename it to bf16"),
    "data_efficiency": Refusal("the program reads the data itself", "remove it; write a curriculum by sequence length as stages:"),
    "curriculum_learning": _removed(
        "it, and the program reads the data itself", "remove it; write a curriculum by sequence length as stages:"
    ),
    "dataloader_drop_last": Refusal("the program reads the data itself", "remove it"),
    "activation_checkpointing": Refusal(
        "the program recomputes activations itself", "remove it; use --recompute-granularity selective or full"
    ),
    "checkpoint": Refusal(_OWN_CHECKPOINTS, "remove it; use --save, --load, --async-save"),
    "datastates_ckpt": Refusal(_OWN_CHECKPOINTS, "remove it; use --async-save"),
    "nebula": _removed("it, and " + _OWN_CHECKPOINTS, "remove it; use --async-save"),
    "pipeline": Refusal(
        "the program divides the layers itself",
        "remove it; use --pipeline-model-parallel-size, --pipeline-balance, --recompute-granularity",
    ),
    "tensor_parallel": Refusal("the program splits the layers itself", "remove it; use --tensor-model-parallel-size"),
    "sequence_parallel_size": Refusal("the program splits the sequence itself", "remove it; use --context-parallel-size"),
    "seq_parallel_communication_data_type": Refusal("the program splits the sequence itself", "remove it"),
    "compile": Refusal("the program compiles the blocks itself", "remove it; use --compile"),
    "tensorboard": Refusal(_OWN_LOG, "remove it; use --tensorboard-dir"),
    "wandb": Refusal(_OWN_LOG, "remove it; use --wandb-project"),
    "comet": Refusal(_OWN_LOG, "remove it; SAVE/metrics.jsonl has every step"),
    "csv_monitor": Refusal(_OWN_LOG, "remove it; SAVE/metrics.jsonl has every step"),
    "autotuning": Refusal("it ends the program after some steps", "remove it; see megatron-patch plan --search for a layout"),
    "hybrid_engine": Refusal("it is an engine for reinforcement learning", "remove it"),
    "expert_parallel": Refusal("the program has no mixture of experts", "remove it"),
    "use_data_before_expert_parallelism": Refusal("the program has no mixture of experts", "remove it"),
    "weight_quantization": Refusal("it quantizes weights for inference", "remove it"),
    "compression_training": _removed("it, and the model would train unquantized"),
    "quantize_training": _removed("it, and the model would train unquantized"),
    "elasticity": _removed(
        "it; the program resumes on any number of ranks without it", "remove it; --global-batch-size keeps the batch on any number of ranks"
    ),
    "amp": _removed("it", "remove it; use --bf16 or --fp16"),
    "sparse_attention": _removed("it"),
    "sparse_gradients": _removed("it"),
    "progressive_layer_drop": _removed("it"),
    "eigenvalue": _removed("it"),
    "graph_harvesting": _removed("it"),
    "disable_allgather": Refusal("DeepSpeed ignores it", "remove it"),
    "vocabulary_size": Refusal("it has no effect", "remove it; use --vocab-size and --make-vocab-size-divisible-by"),
    "data_types.param_dtype": Refusal("the program sets the type of the weights", "remove it; use --bf16 or --fp16"),
    "data_types.buffer_dtype": Refusal("it would round the tables of rotary positions", "remove it"),
    "data_types.keep_in_fp32_modules": Refusal("it is for models of transformers", "remove it"),
    "aio.thread_count": Refusal("it is the old name of intra_op_parallelism", "rename it to intra_op_parallelism"),
    "torch_autocast.lower_precision_safe_modules": Refusal(
        "it makes DeepSpeed import modules by name", "remove it; the default is torch's linear and convolution layers"
    ),
    "zero_optimization.mics_shard_size": _removed("it"),
    "zero_optimization.mics_hierarchical_params_gather": _removed("it"),
    "zero_optimization.zeropp_loco_param": _removed("it"),
}
"""Keys that are refused, by path. A section that is switched off ("enabled": false) is dropped instead."""

_FLOAT32 = "checkpoints rely on float32 master weights, gradients and moments"
_OTHER_OPTIMIZER = "it would replace the program's optimizer by one of DeepSpeed"

FIXED: Mapping[str, Fixed] = {
    "bf16.bf16_master_weights_and_grads": Fixed(False, _FLOAT32),
    "bf16.bf16_optimizer_states": Fixed(False, _FLOAT32),
    "fp16.fp16_master_weights_and_grads": Fixed(False, _FLOAT32),
    "fp16.auto_cast": Fixed(False, "it would round the weights of labels"),
    "zero_optimization.compute_grad_norm": Fixed(True, "clipping and the check of steps need the norm of the gradient"),
    "zero_optimization.round_robin_gradients": Fixed(
        False, "it moves parameters, which would get each other's float32 weights and moments"
    ),
    "zero_optimization.zero_hpz_partition_size": Fixed(
        1, "its second copy of the weights would get neither initial weights nor those of a checkpoint"
    ),
    "zero_optimization.stage3_module_granularity_threshold": Fixed(0, "it gathers whole blocks, whose weights then cannot be set"),
    "zero_optimization.legacy_stage1": Fixed(False, "DeepSpeed no longer has it"),
    "zero_optimization.zenflow": Fixed(None, _OTHER_OPTIMIZER),
    "zero_optimization.offload_optimizer.super_offload": Fixed(False, _OTHER_OPTIMIZER),
    "zero_optimization.offload_optimizer.ratio": Fixed(1, _OTHER_OPTIMIZER),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Fixed(
        False, "it is for DeepSpeed's own Muon", "remove it; --optimizer muon keeps its momentum where offload_optimizer says"
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": Fixed(False, "all weights are trained"),
    "zero_optimization.cpu_offload": Fixed(
        False, "it is an old name of offload_optimizer", 'write "offload_optimizer": {"device": "cpu"} in its place'
    ),
    "zero_optimization.cpu_offload_param": Fixed(
        False, "it is an old name of offload_param", 'write "offload_param": {"device": "cpu"} in its place'
    ),
    "zero_optimization.cpu_offload_use_pin_memory": Fixed(
        False, "it is an old name", "write pin_memory in offload_optimizer or offload_param in its place"
    ),
}
"""Keys with only one possible value, by path."""

HIGHEST_POWER = 62
"""Largest `fp16.initial_scale_power`: DeepSpeed multiplies the loss with a whole number of Python, which torch takes up to 64 bits."""

WITHOUT_EFFECT = (
    "zero_optimization.elastic_checkpoint",
    "zero_optimization.load_from_fp32_weights",
    "zero_optimization.pipeline_loading_checkpoint",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
)
"""Keys for DeepSpeed's own checkpoints, which many files have: they are dropped with a note."""
