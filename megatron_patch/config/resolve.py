"""Turns options into a run that can start: the model's shape, the stage plan, the data-parallel size, all checks that need no data.

In: `ParsedOptions` and the number of ranks. Out: `RunConfig`, from which each part of the program takes what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from megatron_patch.config.checks import (
    check_count,
    check_documents,
    check_numbers,
    check_options,
    check_parallel,
    check_plan,
    check_profile_ranks,
)
from megatron_patch.config.context_checks import check_context_parallel, gathering_notes
from megatron_patch.config.expert_stages import balance_of, check_expert_parallel, check_expert_stages
from megatron_patch.config.layer_patterns import dense_blocks, full_attention_blocks, unrotated_blocks, window_positions
from megatron_patch.config.megatron.command_line import MegatronReport
from megatron_patch.config.options import ExpertOptions, ModelOptions, Options
from megatron_patch.config.parsing import ParsedOptions, option_values, parse
from megatron_patch.config.plan_builder import build_plan, reschedule
from megatron_patch.config.problems import one_error, problems_of
from megatron_patch.config.scale import default_decay_fraction, default_patch_size, needs_decay_fraction, needs_patch_size, scale_notes
from megatron_patch.config.schedules import check_given_lengths, schedule_notes
from megatron_patch.config.stage_spec import has_weights, parse_blend, parse_epoch_limits, stage_specs
from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.data.missing_dataset import check_datasets, is_local_glob, missing_dataset
from megatron_patch.data.storage import is_address
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.families import Family, family_by_name
from megatron_patch.model.flops import parameter_count
from megatron_patch.model.own_model import OwnModel
from megatron_patch.model.pipeline_partition import pipeline_partition
from megatron_patch.model.shape import ModelShape, check_shape, default_ffn_hidden_size
from megatron_patch.model.sharding import check_sharding, gathers_keys
from megatron_patch.stages import StagePlan
from megatron_patch.utils.units import format_count, plural

ASSUMED_VOCAB_SIZE = 32_000
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunConfig:
    """A run whose options are complete and checked.

    Args:
        options: all options, as given or by default.
        origins: option name -> "flag" or the path of the file, for the options that were given.
        shape: the model's shape.
        plan: the stages.
        blend: the training corpora as (prefix, weight).
        valid_blend: the held-out corpora; empty where a part of the training corpora is held out.
        data_metadata: the metadata file of the first corpus, or None.
        data_parallel_size: number of ranks that share a global batch.
        notes: what the program decided and may surprise, for the console.
        megatron: what became of flags that only Megatron has; None: there were none.
        own_model: the user's model in place of `GPTModel`, which only the Python API can give; None: `GPTModel`.
    """

    options: Options
    origins: Mapping[str, str]
    shape: ModelShape
    plan: StagePlan
    blend: tuple[tuple[str, float], ...]
    valid_blend: tuple[tuple[str, float], ...]
    data_metadata: DatasetMetadata | None
    data_parallel_size: int
    notes: tuple[str, ...] = ()
    megatron: MegatronReport | None = None
    own_model: OwnModel | None = None

    @property
    def gathering_sizes(self) -> frozenset[int]:
        """Context-parallel sizes of stages in which ranks gather keys and values, in place of sharing heads."""
        engine, sizes = self.options.engine, {stage.context_parallel_size for stage in self.plan.stages}
        tensor, comm_type = engine.tensor_model_parallel_size, engine.cp_comm_type
        return frozenset(size for size in sizes if gathers_keys(self.shape, tensor, size, comm_type))

    @property
    def ranks(self) -> int:
        """Number of ranks that the run was resolved for."""
        engine = self.options.engine
        return self.data_parallel_size * engine.tensor_model_parallel_size * engine.pipeline_model_parallel_size

    @property
    def save_folder(self) -> Path | None:
        """The run's folder (--save), or None."""
        return Path(self.options.checkpoint.save) if self.options.checkpoint.save else None

    @property
    def eod_id(self) -> int | None:
        """Id of the end-of-document token, or None where it is not known."""
        if self.options.data.eod_token_id is not None:
            return self.options.data.eod_token_id
        return self.data_metadata.eod_id if self.data_metadata else None

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Prefixes of all corpora that are read for training, in any stage."""
        of_stages = (name for stage in self.plan.stages for name, _ in stage.blend or ())
        return tuple(dict.fromkeys([*(name for name, _ in self.blend), *of_stages]))

    @property
    def data_words(self) -> tuple[tuple[str, str], ...]:
        """(flag or stage, word) of all corpora that the run reads: those of training, of the stages, and held-out ones."""
        words = [("--data-path", word) for word, _ in self.blend]
        words += [(f"stage {stage.name}: data_path", word) for stage in self.plan.stages for word, _ in stage.blend or ()]
        return tuple(dict.fromkeys([*words, *(("--valid-data-path", word) for word, _ in self.valid_blend)]))

    @property
    def training_split(self) -> str:
        """How the training corpora are split: by --split, or not at all where there are held-out corpora."""
        return "1,0,0" if self.valid_blend else self.options.data.split

    @property
    def weighs_held_out(self) -> bool:
        """Whether the corpora whose held-out data is evaluated have weights: those of --valid-data-path, or else of --data-path."""
        return has_weights(self.options.data.valid_data_path or self.options.data.data_path)

    @property
    def epoch_limits(self) -> dict[str, float]:
        """Largest number of epochs of each corpus that --max-epochs limits."""
        return parse_epoch_limits(self.options.data.max_epochs, self.corpus_names)

    @property
    def pipeline_boundaries(self) -> list[int]:
        """Boundaries of the layers that each pipeline rank holds, as `pipeline_partition` returns them."""
        engine = self.options.engine
        return pipeline_partition(self.shape, engine.pipeline_model_parallel_size, engine.pipeline_balance, self.options.stages.seq_length)

    def plan_with_batch_of(self, plan: StagePlan) -> StagePlan:
        """Returns the plan that the options describe with the global batch of the run's first plan, whatever the number of ranks.

        Raises:
            ConfigError: the options give no valid plan with that batch.
        """
        return _plan(self.options, self.data_parallel_size, self._decay_fraction, plan)

    def reschedule(self, plan: StagePlan) -> StagePlan:
        """Returns a plan of as many stages with the learning rates that the options describe.

        Raises:
            ConfigError: the learning rates do not fit the stages.
        """
        return reschedule(plan, self.options.stages, self.options.schedule, self._decay_fraction)

    @property
    def _decay_fraction(self) -> float:
        return default_decay_fraction(parameter_count(self.shape).total)

    def to_json(self) -> dict[str, Any]:
        """Returns all option values and where they came from, as plain JSON values."""
        return {"options": option_values(self.options), "origins": dict(self.origins)}


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _activation(options: ModelOptions, family: Family) -> Literal["swiglu", "geglu", "gelu"]:
    # A family's GeGLU is replaced by --swiglu and by --no-swiglu.
    if _given(options.geglu, family.geglu and options.swiglu is None):
        return "geglu"
    return "swiglu" if _given(options.swiglu, family.swiglu) and not options.geglu else "gelu"


def _expert_shape(options: ExpertOptions, num_layers: int, ffn_hidden_size: int) -> ExpertShape | None:
    if options.num_experts is None:
        return None
    return ExpertShape(
        count=options.num_experts,
        top_k=options.moe_router_topk,
        ffn_hidden_size=options.moe_ffn_hidden_size or ffn_hidden_size,
        shared_ffn_hidden_size=options.moe_shared_expert_intermediate_size or 0,
        score=options.moe_router_score_function,
        renormalized=not options.moe_router_pre_softmax,
        scaling=options.moe_router_topk_scaling_factor,
        bias=options.moe_router_enable_expert_bias,
        dense_layers=dense_blocks(options, num_layers),
    )


def build_shape(options: ModelOptions, experts: ExpertOptions, vocab_size: int, longest: int, tensor_parallel_size: int) -> ModelShape:
    """Returns the model's shape: each option as given, or else by the default of its family.

    Args:
        options: the model's options.
        experts: options of experts.
        vocab_size: token ids are below this.
        longest: positions of the longest sample.
        tensor_parallel_size: ranks that share the vocabulary.

    Raises:
        ConfigError: an unknown family, or a shape that cannot be built.
    """
    family = family_by_name(options.model_family)
    if family.experts and experts.num_experts is None:
        raise ConfigError(
            f"--model-family {options.model_family} without --num-experts",
            "--num-experts with the number of experts of a block",
            "give --num-experts, or the family of a model without experts",
        )
    heads, hidden = options.num_attention_heads, options.hidden_size
    if options.kv_channels is None and hidden % heads:
        raise ConfigError(
            f"--hidden-size {hidden} does not divide into {heads} heads",
            "a hidden size that is a multiple of --num-attention-heads",
            "change one of them or give --kv-channels",
        )
    qk_norm = _given(options.qk_layernorm, family.qk_norm)
    activation = _activation(options, family)
    inner = options.ffn_hidden_size or default_ffn_hidden_size(hidden, activation != "gelu")
    head_size = options.kv_channels or hidden // heads
    bias = not _given(options.disable_bias_linear, not family.linear_bias)
    positions = options.max_position_embeddings or longest
    if positions < longest:
        raise ConfigError(
            f"--max-position-embeddings {positions} with samples of {longest} positions",
            f"at least {longest}",
            "raise it or leave it out",
        )
    full = full_attention_blocks(options)
    # A window that no block has is none.
    window = None if options.window_size is None or len(full) == options.num_layers else window_positions(options.window_size)
    # The same for all layouts that divide it, so that a checkpoint goes from one to another.
    multiple = math.lcm(options.make_vocab_size_divisible_by, tensor_parallel_size)
    shape = ModelShape(
        num_layers=options.num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=options.num_query_groups or heads,
        head_size=head_size,
        ffn_hidden_size=inner,
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // multiple) * multiple,
        max_positions=positions,
        normalization=_given(options.normalization, family.normalization),
        norm_epsilon=_given(options.norm_epsilon, family.norm_epsilon),
        zero_centered_norms=_given(options.zero_centered_norms, family.zero_centered_norms),
        activation=activation,
        position_embedding="rope" if _given(options.position_embedding_type, family.position_embedding) == "rope" else "learned",
        rotary_base=options.rotary_base,
        rotary_scaling=options.rope_scaling,
        rotary_factor=options.rope_scaling_factor,
        rotary_low_frequency_factor=options.rope_low_freq_factor,
        rotary_high_frequency_factor=options.rope_high_freq_factor,
        rotary_original_positions=options.rope_original_positions,
        rotary_beta_fast=options.rope_beta_fast,
        rotary_beta_slow=options.rope_beta_slow,
        rotary_attention_factor=options.rope_attention_factor,
        window=window,
        full_layers=full if window is not None else (),
        unrotated_layers=unrotated_blocks(options),
        windowed_rotary_base=options.windowed_rotary_base,
        norm_placement=_given(options.norm_placement, family.norm_placement),
        qk_norm=qk_norm,
        qk_norm_scope=_given(options.qk_norm_scope, family.qk_norm_scope if qk_norm else "head"),
        query_scalar=None if options.query_pre_attn_scalar == head_size else options.query_pre_attn_scalar,
        attention_softcap=_given(options.attn_logit_softcapping, family.attention_softcap) or None,
        logit_softcap=_given(options.final_logit_softcapping, family.logit_softcap) or None,
        scaled_embeddings=_given(options.scale_embeddings, family.scaled_embeddings),
        attention_bias=bias,
        qkv_bias=_given(options.add_qkv_bias, family.qkv_bias) or bias,
        mlp_bias=bias,
        tie_embeddings=not _given(options.untie_embeddings_and_output_weights, not family.tie_embeddings),
        init_std=options.init_method_std,
        experts=_expert_shape(experts, options.num_layers, inner),
    )
    check_shape(shape)
    check_sharding(shape, tensor_parallel_size)
    return shape


def _first_metadata(word: str, dry_run: bool) -> DatasetMetadata | None:
    """Returns the metadata of the first dataset that a word of --data-path names. A dry run needs no data."""
    try:
        prefix = expand_prefixes(word)[0]
    except DataError as error:
        if dry_run and is_local_glob(word):
            return None
        raise missing_dataset(word, "--data-path") or error from error
    try:
        return read_metadata(prefix)
    except DataError:
        if dry_run and is_address(prefix):
            return None  # a note of the plan names what cannot be reached
        raise


def _vocab_size(options: Options, metadata: DatasetMetadata | None, blend: Sequence[tuple[str, float]], notes: list[str]) -> int:
    """Returns the size of the vocabulary: the one given, else that of the data. A dry run without both assumes one, and notes it."""
    given = options.model.vocab_size
    if metadata is not None:
        if given is not None and given < metadata.vocab_size:
            raise ConfigError(
                f"--vocab-size {given}, but the data was tokenized with a vocabulary of {metadata.vocab_size}",
                f"at least {metadata.vocab_size}",
                "remove --vocab-size to use the size of the data",
            )
        return given or metadata.vocab_size
    if given is not None:
        return given
    if options.logging.dry_run:
        notes.append(
            f"vocabulary assumed to be {ASSUMED_VOCAB_SIZE:,}, because neither --vocab-size nor a dataset's metadata file is given"
        )
        return ASSUMED_VOCAB_SIZE
    # Not the vocabulary is missing then: the path is wrong.
    check_datasets([("--data-path", word) for word, _ in blend])
    raise ConfigError(
        "the size of the vocabulary is unknown",
        "--vocab-size N, or a dataset with its metadata file (PREFIX.json), as tools/preprocess_data.py writes it",
        "give --vocab-size",
    )


def check_together(options: Options, ranks: int, origins: Mapping[str, str] = MappingProxyType({})) -> None:
    """Checks what needs neither plan nor data, and reports all of it.

    Raises:
        ConfigError: options are out of range, or contradict each other or the number of ranks.
    """
    problems = problems_of(lambda: check_numbers(options))
    if not problems:  # the other checks compute with the numbers
        problems = problems_of(
            lambda: check_options(options, origins),
            lambda: check_parallel(options.engine, ranks),
            lambda: check_profile_ranks(options.logging, ranks),
        )
    if problems:
        raise one_error(problems)


def resolve(parsed: ParsedOptions, ranks: int) -> RunConfig:
    """Completes and checks the options of a run, before any work on a GPU.

    Args:
        parsed: the options and their origins.
        ranks: number of processes of the job.

    Raises:
        ConfigError: the run is not possible.
        DataError: the metadata file of the first corpus is damaged, or the size of the vocabulary is unknown because a corpus is missing.
    """
    options = parsed.options
    notes: list[str] = []
    check_together(options, ranks, parsed.origins)
    data_parallel_size = ranks // (options.engine.tensor_model_parallel_size * options.engine.pipeline_model_parallel_size)
    blend = parse_blend(options.data.data_path)
    valid_blend = parse_blend(options.data.valid_data_path, "--valid-data-path")
    if not blend and not options.logging.dry_run:
        raise ConfigError("no data is given", "--data-path PREFIX", "give --data-path; tools/preprocess_data.py makes a dataset from text")
    metadata = _first_metadata(blend[0][0], options.logging.dry_run) if blend else None
    vocab_size = _vocab_size(options, metadata, blend, notes)
    check_count("vocab_size", vocab_size, "a vocabulary of")
    # Evaluation reads samples of --seq-length positions, and no stage has longer ones.
    tensor = options.engine.tensor_model_parallel_size
    shape = build_shape(options.model, options.experts, vocab_size, options.stages.seq_length, tensor)
    parameters = parameter_count(shape).total
    by_scale = []
    if needs_patch_size(options.stages):
        options = replace(options, stages=replace(options.stages, patch_size=default_patch_size(parameters)))
        by_scale.append(f"--patch-size {options.stages.patch_size}")
    decay_fraction = default_decay_fraction(parameters)
    plan = _plan(options, data_parallel_size, decay_fraction)
    specs = stage_specs(options.stages)
    check_given_lengths(plan, specs)
    if needs_decay_fraction(options, plan):
        by_scale.append(f"--lr-wsd-decay-fraction {decay_fraction}")
    if by_scale:
        notes.append(f"{' and '.join(by_scale)} by default, for a model of {format_count(parameters)} parameters")
    notes.extend(_padding_notes(plan, data_parallel_size))
    notes.extend(_rounding_notes(options, plan))
    notes.extend(schedule_notes(plan, specs, options.schedule))
    check_plan(options, plan)
    check_context_parallel(options.engine, plan, shape, data_parallel_size)
    check_expert_stages(options.experts, plan, specs)
    notes.extend(gathering_notes(options.engine, plan, shape))
    notes.extend(scale_notes(options, plan, parameters))
    run = RunConfig(options, parsed.origins, shape, plan, blend, valid_blend, metadata, data_parallel_size, tuple(notes), parsed.megatron)
    check_documents(options.data, run.eod_id, shape.vocab_size)
    check_expert_parallel(options.engine, shape, run.pipeline_boundaries, data_parallel_size)
    _ = run.epoch_limits  # raises a ConfigError where they are impossible
    return run


def _plan(options: Options, data_parallel_size: int, decay_fraction: float, batch_of: StagePlan | None = None) -> StagePlan:
    """Returns the plan that the options describe; see `build_plan`."""
    context = options.engine.context_parallel_size
    balance = balance_of(options.experts)
    return build_plan(options.stages, options.schedule, data_parallel_size, decay_fraction, batch_of, context, balance)


def with_plan(run: RunConfig, plan: StagePlan) -> RunConfig:
    """Returns the run with the plan of its checkpoint in place of its own, and without the notes on how its own plan was made."""
    return replace(run, plan=plan, notes=tuple(_padding_notes(plan, run.data_parallel_size)))


def _padding_notes(plan: StagePlan, data_parallel_size: int) -> list[str]:
    """Returns notes on stages whose steps do not divide into full micro-batches."""
    notes = []
    for stage in plan.stages:
        ranks = stage.sample_ranks(data_parallel_size)
        samples = stage.micro_batch_size * ranks
        if stage.global_batch_size % samples:
            notes.append(
                f"stage {stage.name}: steps of {plural(stage.global_batch_size, 'sample')} do not divide evenly into micro-batches of "
                f"{stage.micro_batch_size} on {_sample_ranks(ranks, stage.context_parallel_size)}; the last micro-batch of each step is "
                "padded with samples that do not count"
            )
    return notes


def _sample_ranks(ranks: int, context_parallel_size: int) -> str:
    """Returns the name of the ranks, or groups of ranks, that read different samples, with their number."""
    if context_parallel_size == 1:
        return plural(ranks, "data-parallel rank")
    return f"{plural(ranks, 'group')} of {plural(context_parallel_size, 'context-parallel rank')}"


def _rounding_notes(options: Options, plan: StagePlan) -> list[str]:
    """Returns notes where the plan differs from the options, because micro-batches, steps and blocks are full ones."""
    notes = []
    given = options.stages.global_batch_tokens
    if given is not None:
        largest = max(plan.stages, key=lambda stage: stage.micro_batch_size * stage.sample_tokens)
        finest = plan.finest_stage
        # A plan with only patch stages holds either the tokens or the positions of a step constant; at K = 1 they are the same.
        taken = min((finest.tokens_per_step, finest.positions_per_step), key=lambda count: abs(count - given))
        # The learning rate was chosen for the given batch, and a much larger or smaller one needs another.
        if abs(taken - given) > 0.1 * given:
            notes.append(
                f"a step at K = 1 has {taken:,} tokens instead of --global-batch-tokens {given:,}, because micro-batches are full: "
                f"in stage {largest.name}, {plural(largest.micro_batch_size, 'sample')} of {largest.sample_tokens:,} tokens on each rank. "
                "A smaller --micro-batch-size comes closer"
            )
    tokens = options.stages.train_tokens
    if tokens is not None and abs(plan.tokens - tokens) > 0.01 * tokens:
        notes.append(
            f"the stages read {plan.tokens:,} tokens instead of --train-tokens {tokens:,}, because they have full steps and blocks"
        )
    return notes


def load_config(argv: Sequence[str], ranks: int) -> RunConfig:
    """Reads a command line and resolves it.

    Args:
        argv: the arguments, without the program's name.
        ranks: number of processes of the job; --world-size replaces it in a dry run.

    Raises:
        ConfigError: as for `parse` and `resolve`.
        DataError: as for `resolve`.
    """
    parsed = parse(argv)
    return resolve(parsed, planned_ranks(parsed, ranks))


def planned_ranks(parsed: ParsedOptions, ranks: int) -> int:
    """Returns the number of ranks that a run is for: that of the job, or in a dry run --world-size.

    Raises:
        ConfigError: --world-size is given without --dry-run, or is not a number of ranks.
    """
    planned = parsed.options.logging.world_size
    if planned is None:
        return ranks
    if not parsed.options.logging.dry_run:
        raise ConfigError(
            f"--world-size {planned} without --dry-run", "--world-size in a dry run", "remove it; the launcher sets the number of ranks"
        )
    if planned < 1:
        raise ConfigError(f"--world-size {planned}", "whole numbers from 1", "give another number of ranks")
    return planned
