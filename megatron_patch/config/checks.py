"""What cannot run, before anything is opened: numbers out of their range, and options that contradict each other.

In: options, then the plan and the vocabulary that they led to. Out: nothing, or a ConfigError. What makes a stage, a schedule or a model's
shape impossible is refused where these are built (`stage_plan`, `resolve`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

from megatron_patch.config.options import DataOptions, EngineOptions, Options
from megatron_patch.data.corpus import split_ranges
from megatron_patch.errors import ConfigError
from megatron_patch.stages import StagePlan
from megatron_patch.tokenizers.base import TOKENIZERS
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import format_duration

_FROM_ONE = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size"),
    *("make_vocab_size_divisible_by", "max_position_embeddings", "rope_original_positions"),
    *("patch_size", "train_tokens", "seq_length", "micro_batch_size", "global_batch_size", "global_batch_tokens", "block_tokens"),
    *("lr_decay_tokens", "shuffle_window_blocks", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("distributed_timeout_minutes", "initial_loss_scale"),
    *("save_interval", "save_interval_tokens", "keep_every", "keep_every_tokens", "exit_interval"),
    *("max_sick_steps", "check_replicas_interval", "replay_interval"),
    *("log_interval", "eval_interval", "eval_interval_tokens", "eval_tokens", "sample_tokens", "world_size"),
}
_FROM_ZERO = {"weight_decay", "clip_grad", "eod_token_id", "exit_margin", "hang_timeout", "sample_temperature"}
_ABOVE_ZERO = {
    *("norm_epsilon", "rotary_base", "init_method_std", "adam_eps", "loss_scale", "peak_tflops"),
    *("exit_duration", "spike_threshold", "spike_grad_norm"),
}


def check_numbers(options: Options) -> None:
    """Every number must be finite and in its range.

    Raises:
        ConfigError: one is not.
    """
    for group in dataclasses.fields(options):
        part = getattr(options, group.name)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            allowed = None
            if not math.isfinite(value):
                allowed = "finite numbers"
            elif field.name in _FROM_ONE and value < 1:
                allowed = "whole numbers from 1" if isinstance(value, int) else "numbers from 1"
            elif field.name in _FROM_ZERO and value < 0:
                allowed = "numbers from 0"
            elif field.name in _ABOVE_ZERO and value <= 0:
                allowed = "numbers above 0"
            if allowed is not None:
                needed = field.default is dataclasses.MISSING
                raise ConfigError(_given(field.name, value), allowed, "give another" if needed else "give another, or leave it out")


def _given(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {value}"


def check_parallel(options: EngineOptions, ranks: int) -> None:
    """The ranks must divide into the layout.

    Raises:
        ConfigError: they do not, or the layout contradicts itself.
    """
    sizes = {
        "--tensor-model-parallel-size": options.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": options.pipeline_model_parallel_size,
    }
    if options.sequence_parallel and options.tensor_model_parallel_size == 1:
        raise ConfigError("--sequence-parallel without tensor parallelism", "a tensor-parallel size above 1", "remove the flag")
    if options.bf16 and options.fp16:
        raise ConfigError("--bf16 and --fp16", "one of them", "remove one")
    model = math.prod(sizes.values())
    if ranks % model:
        raise ConfigError(
            f"{ranks} ranks with " + " and ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1),
            f"ranks in multiples of {model}",
            "change the number of ranks or the parallel sizes",
        )


def check_options(options: Options) -> None:
    """Options beside each other.

    Raises:
        ConfigError: naming those that do not go together.
    """
    _check_optimizer(options)
    _check_safety(options)
    _check_checkpoints(options)
    _check_packages(options)
    logging = options.logging
    if logging.eval_interval is not None and logging.eval_interval_tokens is not None:
        raise ConfigError("--eval-interval and --eval-interval-tokens", "one of them", "remove one")
    if not 0 < logging.sample_top_p <= 1:
        raise ConfigError(f"--sample-top-p {logging.sample_top_p}", "numbers above 0 and up to 1", "0.95, for example")
    split_ranges(1 << 40, options.data.split)
    if options.data.tokenizer_type is not None:
        lookup(TOKENIZERS, options.data.tokenizer_type, "--tokenizer-type")


def _check_optimizer(options: Options) -> None:
    schedule = options.schedule
    if schedule.lr_wsd_decay_fraction is not None:
        if not 0.0 < schedule.lr_wsd_decay_fraction <= 1.0:
            raise ConfigError(_given("lr_wsd_decay_fraction", schedule.lr_wsd_decay_fraction), "a share above 0 and up to 1")
        if schedule.lr_wsd_decay_tokens:
            raise ConfigError("--lr-wsd-decay-tokens and --lr-wsd-decay-fraction", "one of them", "remove one")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(schedule, name)
        if not 0.0 <= value < 1.0:
            raise ConfigError(_given(name, value), "numbers from 0 to below 1", "give another, or leave it out")


def _check_safety(options: Options) -> None:
    safety, engine = options.safety, options.engine
    if safety.spike_window < 2:
        raise ConfigError(f"--spike-window {safety.spike_window}", "whole numbers from 2", "leave it out")
    if safety.check_replicas_interval and engine.zero_stage == 3:
        raise ConfigError(
            "--check-replicas-interval with --zero-stage 3: no rank holds what another holds", "ZeRO 0 to 2", "leave the flag out"
        )
    # The watchdog comes before the collectives' own end, which writes no stacks and has no code of its own.
    hang, collective = safety.hang_timeout, 60 * engine.distributed_timeout_minutes
    if hang >= collective:
        raise ConfigError(
            f"--hang-timeout of {format_duration(hang)} with --distributed-timeout-minutes {engine.distributed_timeout_minutes}",
            "a shorter time for the first: it writes the stacks of all ranks before their collectives give up",
            f"--distributed-timeout-minutes {math.ceil(hang / 60) + 10}, or a shorter --hang-timeout",
        )


def _check_checkpoints(options: Options) -> None:
    checkpoint, dry_run = options.checkpoint, options.logging.dry_run
    if checkpoint.save_interval is not None and checkpoint.save_interval_tokens is not None:
        raise ConfigError("--save-interval and --save-interval-tokens", "one of them", "remove one")
    if checkpoint.finetune and checkpoint.load is None:
        raise ConfigError("--finetune without --load", "--load with the folder to take weights from", "give --load")
    if checkpoint.finetune and checkpoint.load == checkpoint.save:
        raise ConfigError("--finetune with the same --load and --save", "another folder to save to", "change --save")
    if (checkpoint.save_interval or checkpoint.save_interval_tokens) and checkpoint.save is None and not dry_run:
        raise ConfigError("a save interval without --save", "--save FOLDER", "give --save")
    if options.logging.log_token_spans and checkpoint.save is None:
        raise ConfigError("--log-token-spans without --save", "--save FOLDER", "give --save")


def _check_packages(options: Options) -> None:
    """What is logged to must be installed: rank 0 alone would find out, with the others waiting for it."""
    if options.logging.dry_run:
        return
    for name, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
        value = getattr(options.logging, name)
        if value is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{_given(name, value)}: {package} is not installed",
                f"pip install 'megatron_patch[{package}]'",
                "install it, or leave it out",
            )


def check_plan(options: Options, plan: StagePlan) -> None:
    """The plan must fit what else is asked for.

    Raises:
        ConfigError: positions that ranks cannot share, or a beginning inside a block.
    """
    size = options.engine.tensor_model_parallel_size
    lengths = {f"stage {stage.name!r}": stage.positions for stage in plan.stages} | {"evaluation": options.stages.seq_length}
    for where, positions in lengths.items():
        if options.engine.sequence_parallel and positions % size:
            raise ConfigError(
                f"--sequence-parallel over {size} ranks with {positions} positions in {where}",
                f"positions that are multiples of {size} in every stage and in evaluation",
                "change --seq-length, the patch sizes or --tensor-model-parallel-size",
            )
    if options.stages.start_tokens % plan.block_tokens:
        raise ConfigError(
            f"--start-tokens {options.stages.start_tokens} is inside a block",
            f"multiples of {plan.block_tokens}",
            "give the tokens that the other run read",
        )


def check_documents(data: DataOptions, eod_id: int | None, vocab_size: int) -> None:
    """Where documents are kept apart their end must be known, and be a token of the model.

    Raises:
        ConfigError: it is not.
    """
    if eod_id is None and (data.reset_attention_mask or data.reset_position_ids or data.eod_mask_loss):
        raise ConfigError(
            "document masks without an end-of-document token",
            "--eod-token-id N, or data whose side file names it",
            "preprocess with --append-eod, or give --eod-token-id",
        )
    if eod_id is not None and eod_id >= vocab_size:
        raise ConfigError(
            f"--eod-token-id {eod_id} with {vocab_size} ids", f"ids from 0 to {vocab_size - 1}", "give the tokenizer's, or leave it out"
        )
