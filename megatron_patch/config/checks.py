"""Checks options before any file is opened: numbers out of range, and options that contradict each other.

In: options, then the plan and the vocabulary that follow from them. Out: nothing, or a ConfigError. Stages, schedules and the model's
shape are checked where they are built (`plan_builder`, `resolve`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_patch.config.expert_checks import check_experts
from megatron_patch.config.layer_patterns import check_layer_patterns
from megatron_patch.config.optimizer_checks import check_lengths, check_muon, check_optimizer
from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import DataOptions, EngineOptions, LoggingOptions, Options
from megatron_patch.config.problems import flag_and_value, one_error, problems_of, shown
from megatron_patch.data.addresses import check_no_credentials
from megatron_patch.data.corpus import split_ranges
from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.requirements import require
from megatron_patch.stages import LONGEST_PATCH, StagePlan
from megatron_patch.tokenizers.base import TOKENIZERS
from megatron_patch.utils.files import same_path
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import format_duration, parse_steps, plural

_FROM_ONE = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size"),
    *("make_vocab_size_divisible_by", "max_position_embeddings", "rope_original_positions"),
    *("moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size"),
    *("patch_size", "train_tokens", "seq_length", "micro_batch_size", "global_batch_size", "global_batch_tokens", "block_tokens"),
    *("lr_decay_tokens", "lr_decay_steps", "lr_wsd_decay_tokens", "lr_wsd_decay_steps", "muon_num_ns_steps"),
    *("shuffle_window_blocks", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    "expert_model_parallel_size",
    *("distributed_timeout_minutes", "initial_loss_scale"),
    *("save_interval", "save_interval_tokens", "keep_every", "keep_every_tokens", "exit_interval"),
    *("max_sick_steps", "check_replicas_interval", "replay_interval"),
    *("log_interval", "eval_interval", "eval_interval_tokens", "eval_tokens", "sample_tokens", "world_size", "prometheus_port"),
}
_FROM_ZERO = {
    *("lr_warmup_tokens", "lr_warmup_steps", "weight_decay", "embedding_weight_decay", "muon_weight_decay", "clip_grad"),
    *("moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    *("attn_logit_softcapping", "final_logit_softcapping", "eod_token_id", "exit_margin", "hang_timeout", "sample_temperature"),
}
_ABOVE_ZERO = {
    *(
        "norm_epsilon",
        "rotary_base",
        "windowed_rotary_base",
        "query_pre_attn_scalar",
        "init_method_std",
        "adam_eps",
        "loss_scale",
        "peak_tflops",
    ),
    *("muon_lr", "decoupled_lr", "muon_extra_scale_factor", "moe_router_topk_scaling_factor"),
    *("exit_duration", "spike_threshold", "spike_grad_norm"),
}
_BELOW_ONE = {"adam_beta1", "adam_beta2", "muon_momentum"}
LARGEST = {
    "num_layers": 10_000,
    "hidden_size": 1_000_000,
    "num_attention_heads": 100_000,
    "num_query_groups": 100_000,
    "kv_channels": 100_000,
    "ffn_hidden_size": 10_000_000,
    "num_experts": 100_000,
    "moe_router_topk": 100_000,
    "moe_ffn_hidden_size": 10_000_000,
    "moe_shared_expert_intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "make_vocab_size_divisible_by": 1_000_000,
    "max_position_embeddings": 1_000_000_000,
    "rope_original_positions": 1_000_000_000,
    "seq_length": 1_000_000_000,
    "patch_size": LONGEST_PATCH,
    "micro_batch_size": 1_000_000,
    "global_batch_size": 1_000_000_000,
    "global_batch_tokens": 10**15,
    "train_tokens": 10**17,
    "lr_warmup_steps": 10**12,
    "lr_decay_steps": 10**12,
    "lr_wsd_decay_steps": 10**12,
    "muon_num_ns_steps": 1_000,
    "world_size": 10_000_000,
    "tensor_model_parallel_size": 1_000,
    "pipeline_model_parallel_size": 1_000,
    "context_parallel_size": 1_000_000,
    "expert_model_parallel_size": 100_000,
    "distributed_timeout_minutes": 1_000_000,
    "hang_timeout": 50_000_000,
    "exit_duration": 1_000_000_000,
    "exit_margin": 1_000_000_000,
    "num_workers": 10_000,
    "spike_window": 1_000_000,
    "sample_tokens": 1_000_000,
    "prometheus_port": 65_535,
}
"""Largest value of each option, times in seconds: far above what is in use, and small enough that a plan is made within a moment."""
_LARGEST_COUNT = 10**18
"""Largest value of all other counts, such as intervals and tokens of a schedule: a signed number of 64 bits holds it."""


def check_count(name: str, value: float, given: str) -> None:
    """Checks that a count or a time is not absurdly large.

    Args:
        name: name of the option or of the key of `stages:`.
        value: the count, or the seconds.
        given: how errors call it, such as "--num-layers".

    Raises:
        ConfigError: it is larger than any machine or corpus; the message has the bound.
    """
    largest = LARGEST.get(name, _LARGEST_COUNT)
    if abs(value) > largest:
        kind = "whole numbers" if isinstance(value, int) else "seconds"
        raise ConfigError(f"{given} {shown(value)}", f"{kind} up to {largest:,}", "give a smaller number")


def check_model_size(shape: ModelShape) -> None:
    """Checks that no size of a model that was made elsewhere is absurdly large.

    Raises:
        ConfigError: one is; the message has the bound of the option that would give it.
    """
    names = {"head_size": "kv_channels", "max_positions": "max_position_embeddings"}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size", *names):
        check_count(names.get(name, name), getattr(shape, name), name)


# Their values are what a model continues: an address in them is a text like any other, and nothing is read from there.
_FLAGS_OF_TEXT = ("--prompt", "--sample-prompts", "--sample_prompts")


def check_text(words: Sequence[str], source: str = "") -> None:
    """Checks that arguments are text without secrets, as options and names of files are stored in JSON, printed and sent to trackers.

    Args:
        words: flags with their values.
        source: where they are from, for the message; "": the command line.

    Raises:
        ConfigError: a word has bytes that are not UTF-8, or a null character; the message names the flag before it.
        DataError: an address in a word contains a password or a token; the message does not repeat it.
    """
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if not is_text(word):
            shown = word.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
            shown = shown if word.startswith("--") or not flag else f"{flag} {shown}"
            raise ConfigError(
                f"{source}{shown[:300]} is not text in UTF-8",
                "names in UTF-8, because checkpoints and logs store them as JSON",
                "rename the file or folder, or give another path",
            )
        if flag not in _FLAGS_OF_TEXT:
            check_no_credentials(word, f"{source}{flag} " if flag and not word.startswith("--") else source)


def is_text(word: str) -> bool:
    """Returns whether a text can be stored in a file, and can be the name of one: it has no lone surrogates and no null character."""
    return "\0" not in word and not any("\ud800" <= character <= "\udfff" for character in word)


def check_numbers(options: Options) -> None:
    """Checks that every number is finite and in its range, and that no count is absurdly large.

    Raises:
        ConfigError: numbers are out of range; the message names all of their flags.
    """
    problems = []
    for group in dataclasses.fields(options):
        part = getattr(options, group.name)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                problems += problems_of(functools.partial(_check_number, field, value))
    if problems:
        raise one_error(problems)


def _check_number(field: dataclasses.Field[Any], value: int | float) -> None:
    allowed = None
    if isinstance(value, float) and not math.isfinite(value):
        allowed = "finite numbers"
    elif field.name in _FROM_ONE and value < 1:
        allowed = "whole numbers from 1" if isinstance(value, int) else "numbers from 1"
    elif field.name in _FROM_ZERO and value < 0:
        allowed = "numbers from 0"
    elif field.name in _ABOVE_ZERO and value <= 0:
        allowed = "numbers above 0"
    elif field.name in _BELOW_ONE and not 0.0 <= value < 1.0:
        allowed = "numbers from 0 to below 1"
    if allowed is not None:
        required = field.default is dataclasses.MISSING
        do = "give another value" if required else "give another value, or leave the flag out for the default"
        raise ConfigError(flag_and_value(field.name, value), allowed, do)
    if isinstance(value, int) or field.name in LARGEST:
        check_count(field.name, value, flag_of(field.name))


def _only_one(first: str, second: str) -> ConfigError:
    """Returns the error for two flags that exclude each other."""
    return ConfigError(f"{first} together with {second}", "one of them", f"remove {first} or {second}")


def check_parallel(options: EngineOptions, ranks: int) -> None:
    """Checks that the ranks divide into tensor-parallel, pipeline-parallel and data-parallel groups.

    Raises:
        ConfigError: the ranks do not divide, or options of the layout contradict each other.
    """
    check_count("world_size", ranks, "a number of ranks of")
    sizes = {
        "--tensor-model-parallel-size": options.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": options.pipeline_model_parallel_size,
    }
    if options.sequence_parallel and options.tensor_model_parallel_size == 1:
        raise ConfigError(
            "--sequence-parallel without tensor parallelism",
            "--tensor-model-parallel-size above 1",
            "remove --sequence-parallel, or raise --tensor-model-parallel-size",
        )
    if options.bf16 and options.fp16:
        raise _only_one("--bf16", "--fp16")
    model = math.prod(sizes.values())
    if ranks % model:
        raise ConfigError(
            f"{plural(ranks, 'rank')} with " + " and ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1),
            f"a number of ranks that is a multiple of {model}",
            "change the number of ranks or the parallel sizes",
        )


def check_profile_ranks(options: LoggingOptions, ranks: int) -> None:
    """Checks that the ranks to profile exist.

    Raises:
        ConfigError: one does not.
    """
    if options.profile is None:
        return
    if outside := [rank for rank in options.profile_ranks if not 0 <= rank < ranks]:
        raise ConfigError(
            f"--profile-ranks {outside[0]} with {plural(ranks, 'rank')}", f"ranks from 0 to {ranks - 1}", "give ranks that exist"
        )


_NOT_IN_WANDB_NAMES = set("/\\#?%:")


def check_options(options: Options, origins: Mapping[str, str] = MappingProxyType({})) -> None:
    """Checks the options that can be checked without a plan and without data.

    Args:
        options: the options.
        origins: name -> "flag" or the path of the file, for those that were given.

    Raises:
        ConfigError: options are not valid, or contradict each other; the message has all that several checks find.
    """
    checks = (
        _check_safety,
        _check_checkpoints,
        _check_packages,
        _check_trackers,
        _check_evaluation,
        _check_tokenizer,
        _check_gate,
        _check_separation,
    )
    problems = problems_of(
        *(functools.partial(check, options) for check in checks),
        *(functools.partial(check, options.schedule) for check in (check_lengths, check_optimizer)),
        lambda: check_layer_patterns(options.model),
        lambda: check_experts(options.experts, options.model.num_layers, origins),
        lambda: check_muon(options.schedule, origins),
        lambda: split_ranges(1 << 40, options.data.split),
    )
    if problems:
        raise one_error(problems)


def _check_evaluation(options: Options) -> None:
    logging = options.logging
    if logging.eval_interval is not None and logging.eval_interval_tokens is not None:
        raise _only_one("--eval-interval", "--eval-interval-tokens")
    if not 0 < logging.sample_top_p <= 1:
        raise ConfigError(f"--sample-top-p {logging.sample_top_p}", "numbers above 0 and up to 1", "give 0.95, for example")


def _check_gate(options: Options) -> None:
    if options.model.swiglu and options.model.geglu:
        raise _only_one("--swiglu", "--geglu")


def _check_tokenizer(options: Options) -> None:
    if options.data.tokenizer_type is not None:
        lookup(TOKENIZERS, options.data.tokenizer_type, "--tokenizer-type")


def _check_safety(options: Options) -> None:
    safety, engine = options.safety, options.engine
    if safety.spike_window < 2:
        raise ConfigError(f"--spike-window {safety.spike_window}", "whole numbers from 2", "leave the flag out for the default")
    if safety.check_replicas_interval and engine.zero_stage == 3:
        raise ConfigError(
            "--check-replicas-interval with --zero-stage 3, where no two ranks hold the same weights",
            "--zero-stage 0, 1 or 2",
            "remove --check-replicas-interval, or lower --zero-stage",
        )
    # The watchdog must act before the collectives time out, because their timeout writes no stacks and has no exit code.
    hang, collective = safety.hang_timeout, 60 * engine.distributed_timeout_minutes
    if hang >= collective:
        raise ConfigError(
            f"--hang-timeout of {format_duration(hang)} with --distributed-timeout-minutes {engine.distributed_timeout_minutes}",
            "a shorter --hang-timeout, so that all ranks write their stacks before their collectives time out",
            f"give --distributed-timeout-minutes {math.ceil(hang / 60) + 10}, or a shorter --hang-timeout",
        )


def _check_checkpoints(options: Options) -> None:
    checkpoint, dry_run = options.checkpoint, options.logging.dry_run
    if checkpoint.save_interval is not None and checkpoint.save_interval_tokens is not None:
        raise _only_one("--save-interval", "--save-interval-tokens")
    if checkpoint.finetune and checkpoint.load is None:
        raise ConfigError("--finetune without --load", "--load with the folder to take the weights from", "give --load FOLDER")
    if checkpoint.finetune and checkpoint.load is not None and checkpoint.save is not None:
        load = Path(checkpoint.load)
        run_of_load = load.resolve().parent if load.name.startswith("step-") else load
        if same_path(run_of_load, checkpoint.save):
            raise ConfigError(
                f"--finetune with --load {checkpoint.load} and --save {checkpoint.save}, which are the folder of one run",
                "another folder for the new run",
                "change --save",
            )
    if (checkpoint.save_interval or checkpoint.save_interval_tokens) and checkpoint.save is None and not dry_run:
        flag = "--save-interval" if checkpoint.save_interval else "--save-interval-tokens"
        raise ConfigError(f"{flag} without --save", "--save FOLDER", f"give --save FOLDER, or remove {flag}")
    if options.logging.log_token_spans and checkpoint.save is None:
        raise ConfigError("--log-token-spans without --save", "--save FOLDER", "give --save FOLDER, or remove --log-token-spans")


def _check_packages(options: Options) -> None:
    """Checks that the packages for logging are installed: later, only rank 0 would fail, and the other ranks would wait for it."""
    if options.logging.dry_run:
        return
    for name, package in (
        ("tensorboard_dir", "tensorboard"),
        ("wandb_project", "wandb"),
        ("mlflow_experiment", "mlflow"),
        ("prometheus_file", "prometheus_client"),
        ("prometheus_port", "prometheus_client"),
    ):
        value = getattr(options.logging, name)
        if value is not None:
            require(package, flag_and_value(name, value))


def _check_trackers(options: Options) -> None:
    logging = options.logging
    if (project := logging.wandb_project) is not None and (len(project) > 128 or set(project) & _NOT_IN_WANDB_NAMES):
        raise ConfigError(
            flag_and_value("wandb_project", project),
            "at most 128 characters, none of / \\ # ? % :, because W&B takes no others",
            "give another name",
        )
    for name in ("mlflow_tracking_uri", "mlflow_run_name"):
        if getattr(logging, name) is not None and logging.mlflow_experiment is None:
            raise ConfigError(
                f"{flag_of(name)} without --mlflow-experiment",
                "--mlflow-experiment with the name of an experiment",
                f"give --mlflow-experiment NAME, or remove {flag_of(name)}",
            )
    if logging.prometheus_file is not None and not logging.prometheus_file.endswith(".prom"):
        raise ConfigError(
            flag_and_value("prometheus_file", logging.prometheus_file),
            "a name that ends in .prom, because node_exporter reads no others",
            "give --prometheus-file FOLDER/NAME.prom",
        )
    if logging.profile is None:
        return
    parse_steps(logging.profile, "--profile")
    if options.checkpoint.save is None and not logging.dry_run and not logging.profile_nsys:
        raise ConfigError("--profile without --save", "--save FOLDER", "give --save FOLDER, or remove --profile")


def check_plan(options: Options, plan: StagePlan) -> None:
    """Checks that the other options fit the plan.

    Raises:
        ConfigError: the plan is absurdly large, tensor-parallel ranks cannot share the positions of a stage evenly, or --start-tokens
            ends inside a block.
    """
    for stage in plan.stages:
        check_count("global_batch_size", stage.global_batch_size, f"stage {stage.name!r}: samples in a step:")
    check_count("train_tokens", plan.tokens, "the stages together: tokens:")
    check_count("block_tokens", plan.block_tokens, "the tokens of a block:")
    size = options.engine.tensor_model_parallel_size
    lengths = {f"stage {stage.name!r}": stage.positions for stage in plan.stages} | {"evaluation": options.stages.seq_length}
    for where, positions in lengths.items():
        if options.engine.sequence_parallel and positions % size:
            raise ConfigError(
                f"--sequence-parallel over {size} ranks with {positions} positions in {where}",
                f"a number of positions that is a multiple of {size}, in every stage and in evaluation",
                "change --seq-length, the patch sizes or --tensor-model-parallel-size",
            )
    if options.stages.start_tokens % plan.block_tokens:
        raise ConfigError(
            f"--start-tokens {options.stages.start_tokens} is inside a block of {plan.block_tokens} tokens",
            f"multiples of {plan.block_tokens}",
            "give the number of tokens that the earlier run read",
        )


def _check_separation(options: Options) -> None:
    """Checks what needs no data: a dry run may have none."""
    if not options.data.data_path and options.data.eod_token_id is None:
        check_documents(options.data, None, 1)


def check_documents(data: DataOptions, eod_id: int | None, vocab_size: int) -> None:
    """Checks that the end-of-document token is known where documents are separated, and that it is in the vocabulary.

    Raises:
        ConfigError: the token is unknown, or not in the vocabulary.
    """
    if eod_id is None and data.separating:
        raise ConfigError(
            f"{' and '.join(map(flag_of, data.separating))} without an end-of-document token",
            "--eod-token-id N, or a dataset whose metadata file (PREFIX.json) has the token",
            "give --eod-token-id, or preprocess the data with --append-eod",
        )
    if eod_id is not None and eod_id >= vocab_size:
        raise ConfigError(
            f"--eod-token-id {eod_id} with a vocabulary of {vocab_size}",
            f"ids from 0 to {vocab_size - 1}",
            "give the id that the tokenizer uses, or leave the flag out",
        )
