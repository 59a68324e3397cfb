"""Compares a run with the checkpoint that it resumes: what must be the same, and what has changed on purpose.

In: a checkpoint's trainer state and the present run. Out: the plan to follow and the changes to print, or one error that names every flag
that differs. The mark of each option (`config.option_types.AtResume`) decides. Models, plans and the order of the data are compared as they
were resolved, so that an option may be written in another way as long as its effect is the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.option_types import AtResume, flag_of
from megatron_patch.config.options import DataOptions, ExpertOptions, ModelOptions, ScheduleOptions, StageOptions
from megatron_patch.config.parsing import option_values, recorded_options
from megatron_patch.config.resolve import RunConfig
from megatron_patch.config.stage_spec import has_weights, parse_blend
from megatron_patch.config.values import RESUME_MARKS
from megatron_patch.data.corpus import split_ranges
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.stages import Progress, StagePlan
from megatron_patch.training.resumed_plan import Changed, ResumedPlan, change, difference, resume_plan, tokens_to_continue_at
from megatron_patch.utils.units import plural

START_NEW = "start a new run from the weights with --finetune --load … --save ELSEWHERE"
_FREE_FIELDS = {"padded_vocab_size"}  # depends on the layout


def _names(*groups: type) -> set[str]:
    return {field.name for group in groups for field in dataclasses.fields(group)}


_BALANCE = {"moe_router_bias_update_rate", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"}
_MODEL = _names(ModelOptions, ExpertOptions) - _BALANCE
_SCHEDULE = {name for name in _names(ScheduleOptions) if name in ("lr", "min_lr") or name.startswith("lr_")}
_PLAN = _names(StageOptions) - {"start_tokens"} | _SCHEDULE
_BY_EFFECT = _MODEL | _PLAN | {"data_path", "split", "eod_token_id"}
"""Options whose effect is compared (the model's shape, the plan, the data), in place of their values."""

_OPTIONS_OF_SHAPE = {
    "head_size": ("kv_channels", "num_attention_heads", "hidden_size"),
    "num_query_groups": ("num_query_groups", "num_attention_heads"),
    "ffn_hidden_size": ("ffn_hidden_size", "hidden_size"),
    "max_positions": ("max_position_embeddings", "seq_length"),
    "activation": ("swiglu", "geglu"),
    "query_scalar": ("query_pre_attn_scalar",),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "scaled_embeddings": ("scale_embeddings",),
    "position_embedding": ("position_embedding_type",),
    "rotary_scaling": ("rope_scaling",),
    "rotary_factor": ("rope_scaling_factor",),
    "rotary_low_frequency_factor": ("rope_low_freq_factor",),
    "rotary_high_frequency_factor": ("rope_high_freq_factor",),
    "rotary_original_positions": ("rope_original_positions",),
    "rotary_beta_fast": ("rope_beta_fast",),
    "rotary_beta_slow": ("rope_beta_slow",),
    "rotary_attention_factor": ("rope_attention_factor",),
    "window": ("window_size",),
    "full_layers": ("window_attn_skip_freq",),
    "unrotated_layers": ("no_rope_freq",),
    "qk_norm_scope": ("qk_norm_scope", "qk_layernorm"),
    "qk_norm": ("qk_layernorm",),
    "attention_bias": ("disable_bias_linear",),
    "qkv_bias": ("add_qkv_bias", "disable_bias_linear"),
    "mlp_bias": ("disable_bias_linear",),
    "tie_embeddings": ("untie_embeddings_and_output_weights",),
    "init_std": ("init_method_std",),
    "experts.count": ("num_experts",),
    "experts.top_k": ("moe_router_topk", "num_experts"),
    "experts.ffn_hidden_size": ("moe_ffn_hidden_size", "ffn_hidden_size", "num_experts"),
    "experts.shared_ffn_hidden_size": ("moe_shared_expert_intermediate_size", "num_experts"),
    "experts.score": ("moe_router_score_function", "num_experts"),
    "experts.renormalized": ("moe_router_pre_softmax", "num_experts"),
    "experts.scaling": ("moe_router_topk_scaling_factor", "num_experts"),
    "experts.bias": ("moe_router_enable_expert_bias", "num_experts"),
    "experts.dense_layers": ("moe_layer_freq", "num_experts"),
}
"""The options that decide a field of `ModelShape` or `ExpertShape`, if not one option of that name; the first one sets it directly."""

_FLAGS_OF_DATA = {
    "blend": "--data-path (weights)",
    "corpora": "--data-path (content of the corpora)",
    "split": "--split or --valid-data-path",
    "seed": "--seed",
    "window_blocks": "--shuffle-window-blocks",
    "skip_blocks": "--start-tokens",
}


def changed_options(state: TrainerState, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the options whose value differs from the checkpoint's: name -> (value then, value now), as plain JSON values.

    Weights without a run have the options of a model at most, so for them there is nothing to compare.
    """
    if state.weights_only:
        return {}
    now = json.loads(json.dumps(option_values(run.options)))
    # An option that the program did not have when the checkpoint was written had its default's effect.
    then = json.loads(json.dumps(_defaults(run))) | dict(state.config["options"])
    return {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}


def _defaults(run: RunConfig) -> dict[str, Any]:
    groups = [getattr(run.options, group.name) for group in dataclasses.fields(run.options)]
    return {field.name: field.default for part in groups for field in dataclasses.fields(part) if field.default is not dataclasses.MISSING}


def progress_problems(state: TrainerState) -> list[str]:
    """Returns what in a trainer state contradicts its own plan; an empty list for a valid state, and for weights without a run."""
    if state.weights_only:
        return []
    if not isinstance(state.config.get("options"), dict):
        return ["config has no options"]
    try:
        plan = StagePlan.from_json(state.plan)
    except ConfigError as error:
        return [f"the plan cannot be read: {error.what}"]
    if state.stage_index >= len(plan.stages):
        return [f"stage_index is {state.stage_index}, but the plan has {plural(len(plan.stages), 'stage')}"]
    stage, progress = plan.stages[state.stage_index], Progress(state.stage_index, state.stage_step)
    if state.stage_step > stage.steps:
        return [f"stage_step is {state.stage_step:,}, but stage {stage.name} has {plural(stage.steps, 'step')}"]
    by_plan = {
        "step": plan.step(progress),
        "consumed_tokens": plan.consumed_tokens(progress),
        "consumed_samples": state.stage_step * stage.global_batch_size,
    }
    found = {name: getattr(state, name) for name in by_plan}
    return [f"{name} is {found[name]:,}, but by the plan it is {value:,}" for name, value in by_plan.items() if found[name] != value]


def check_resume(state: TrainerState, run: RunConfig) -> ResumedPlan:
    """Compares the run with a checkpoint to resume, except for the data (`check_data`).

    Args:
        state: the checkpoint's trainer state.
        run: the present run.

    Returns:
        The plan to follow, and what has changed since the checkpoint, as sentences for the user.

    Raises:
        CheckpointError: the checkpoint holds only weights, or what must not change has changed; the message names every such flag.
    """
    if state.weights_only:
        raise CheckpointError(
            "the checkpoint holds only weights, so there is no run to resume",
            "a checkpoint of a run, or --finetune",
            START_NEW,
        )
    changed = changed_options(state, run)
    differences = _model_differences(state, run, changed, _FREE_FIELDS)
    marked = {name: pair for name, pair in changed.items() if name not in _BY_EFFECT}
    differences += [_pair(flag_of(name), *pair) for name, pair in marked.items() if RESUME_MARKS[name] is AtResume.FIXED]
    differences += _separation_differences(state, run) + _split_differences(state, run)
    own = run.own_model.name if run.own_model else None
    if state.own_model != own:
        differences.append(f"model= was {state.own_model or 'not given'} and is {own or 'not given'} (pretrain of the Python API)")
    changes = [_change(flag_of(name), *pair) for name, pair in marked.items() if RESUME_MARKS[name] is AtResume.REPORTED]
    changes += _held_out_changes(state, run)

    of_plan = {name: pair for name, pair in changed.items() if name in _PLAN and RESUME_MARKS[name] is not AtResume.FREE}
    saved, progress = StagePlan.from_json(state.plan), Progress(state.stage_index, state.stage_step)
    resumed = _plan_to_resume(saved, state, run, progress, of_plan)
    if resumed.differences:
        named = [_pair(flag_of(name), *pair) for name, pair in of_plan.items() if name not in _SCHEDULE and name != "stages"]
        # A difference of stages is named by the stage as well, because a flag can be written in another way without an effect.
        differences += named + list(resumed.differences)
    if differences:
        raise CheckpointError(
            f"the checkpoint belongs to another run: {'; '.join(dict.fromkeys(differences))}",
            "the flags for model, stages, tokens, batch, optimizer, data order and documents that the run began with. What else may "
            "change, and when more --train-tokens or stages extend a run: docs/operations.md",
            f"restore them, or {START_NEW}{_advice_to_continue(state, saved, progress)}",
        )
    # Other words for the same plan are no change; --train-tokens are, even if full steps make the same number of them.
    shown = {name: pair for name, pair in of_plan.items() if name == "train_tokens" or (resumed.changes and name != "stages")}
    flags_of_plan = [_change(flag_of(name), *pair) for name, pair in shown.items()]
    return dataclasses.replace(resumed, changes=(*changes, *flags_of_plan, *resumed.changes, *resumed.kept))


def _advice_to_continue(state: TrainerState, saved: StagePlan, progress: Progress) -> str:
    """Returns the flags with which a new run reads none of this run's tokens; nothing where stages have their own data."""
    if any(stage.blend for stage in saved.stages):
        return ""
    options = state.config["options"]
    start, window = (options.get(name) for name in ("start_tokens", "shuffle_window_blocks"))
    if type(start) is not int or type(window) is not int or window < 1:
        return ""
    flags = f"--start-tokens {start + tokens_to_continue_at(saved, progress, window)} --block-tokens {saved.block_tokens}"
    return f"; with the same data and seed, {flags} let it continue after the tokens of this run"


def check_weights_of(state: TrainerState, run: RunConfig) -> None:
    """Checks that a new run can take a checkpoint's weights; the scale of initial weights may differ, and rotary positions may be longer.

    Raises:
        CheckpointError: the models differ; the message names every flag.
    """
    free = _FREE_FIELDS | {"init_std"} | ({"max_positions"} if run.shape.position_embedding == "rope" else set())
    differences = _model_differences(state, run, changed_options(state, run), free)
    if differences:
        raise CheckpointError(
            f"the checkpoint has another model: {'; '.join(differences)}",
            "the model flags that the checkpoint was written with",
            "change the flags or --load",
        )


def _model_differences(state: TrainerState, run: RunConfig, changed: Mapping[str, Any], free: set[str]) -> list[str]:
    """Returns the flags whose change makes the model another one."""
    defaults = {f.name: f.default for f in dataclasses.fields(ModelShape) if f.default is not dataclasses.MISSING}
    saved, given = (_flat(json.loads(json.dumps(values))) for values in ({**defaults, **state.model}, dataclasses.asdict(run.shape)))
    fields = [name for name in sorted({*saved, *given}) if name not in free and saved.get(name) != given.get(name)]
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields:
        options = _OPTIONS_OF_SHAPE.get(field, (field,))
        cause = next((name for name in (*options, "model_family") if name in changed), None)
        if cause is not None:
            found[cause] = changed[cause]
        else:
            found[options[0]] = saved.get(field), given.get(field)
    return [_pair(flag_of(name), *pair) for name, pair in found.items()]


def _flat(shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a shape, with those of its experts by names such as "experts.count"."""
    experts = shape.pop("experts", None) or {}
    return shape | {f"experts.{name}": value for name, value in experts.items()}


def _separation_differences(state: TrainerState, run: RunConfig) -> list[str]:
    """Returns the difference of the end-of-document token, if documents are separated and it is another one."""
    if not run.options.data.separating:
        return []
    given = state.config["options"].get("eod_token_id")
    then = given if given is not None else (state.data_metadata or {}).get("eod_id")
    return [] if then == run.eod_id else [_pair("--eod-token-id", then, run.eod_id)]


def _split_differences(state: TrainerState, run: RunConfig) -> list[str]:
    """Returns the difference of the split, where both starts reserve a part of --data-path for evaluation."""
    then = state.config["options"]
    if run.valid_blend or then.get("valid_data_path"):
        return []
    given = run.options.data.split
    return [] if _same_split(then.get("split"), given) else [_pair("--split", then.get("split"), given)]


def _held_out_changes(state: TrainerState, run: RunConfig) -> list[str]:
    """Returns the change of the held-out loss where both starts reserve a part of --data-path, and only one of them gives weights.

    Training reads the same with equal weights and without any. The held-out loss then is another mean over the same tokens.
    """
    then = state.config["options"]
    words = then.get("data_path")
    if run.valid_blend or then.get("valid_data_path") or len(run.blend) < 2 or not isinstance(words, list):
        return []
    had, has = has_weights([str(word) for word in words]), run.weighs_held_out
    names = {True: "given", False: "not given"}
    return [] if had == has else [_change("weights of --data-path, also for the held-out loss,", names[had], names[has])]


def _same_split(then: Any, now: Any) -> bool:
    """Returns whether two splits have the same shares, as 9,1,0 and 90,10,0."""
    if not isinstance(then, str) or not isinstance(now, str):
        return bool(then == now)
    try:
        return split_ranges(1 << 40, then) == split_ranges(1 << 40, now)
    except ConfigError:
        return False


def _plan_to_resume(saved: StagePlan, state: TrainerState, run: RunConfig, progress: Progress, changed: Changed) -> ResumedPlan:
    """Returns what `resume_plan` does; options that give no plan with the batch of the first start are a difference."""
    if changed.keys() & {"global_batch_size", "global_batch_tokens"}:
        pairs = zip(saved.stages, run.plan.stages, strict=False)
        if any(old.tokens_per_step != new.tokens_per_step for old, new in pairs):
            return ResumedPlan(saved, ("tokens in a step",))
    try:
        then = recorded_options(state.config["options"], (StageOptions, ScheduleOptions, DataOptions))
        options = dataclasses.replace(run.options, stages=then.stages, schedule=then.schedule)
        before = dataclasses.replace(run, options=options, blend=parse_blend(then.data.data_path))
        before = dataclasses.replace(before, plan=before.plan_with_batch_of(saved))
    except ConfigError as error:
        raise CheckpointError(
            f"the options in the checkpoint give no plan: {error.what}",
            "a trainer state as this program wrote it",
            "resume from another checkpoint",
        ) from error
    try:
        now = dataclasses.replace(run, plan=run.plan_with_batch_of(saved))
        return resume_plan(saved, before, now, progress, changed)
    except ConfigError as error:
        return ResumedPlan(saved, (f"the batch of the first start does not fit the stages: {error.what}",))


def _pair(name: str, then: Any, now: Any) -> str:
    return difference(name, _text(then), _text(now))


def _change(name: str, then: Any, now: Any) -> str:
    return change(name, _text(then), _text(now))


def _text(value: Any) -> str:
    """Returns a value of an option for a sentence; a long list of stages is shortened."""
    if isinstance(value, list):
        value = " ".join(str(item) for item in value)
    text = "not given" if value in (None, "") else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_data(state: TrainerState, fingerprint: Mapping[str, Any]) -> None:
    """Checks that the data is the same as when the checkpoint was written.

    Args:
        state: the checkpoint's trainer state.
        fingerprint: fingerprint of this run's training stream (`TrainStream.fingerprint`).

    Raises:
        CheckpointError: the data differs; the message names every flag.
    """
    saved = state.data_fingerprint
    names = [name for name in sorted({*saved, *fingerprint}) if not _same_data(name, saved.get(name), fingerprint.get(name))]
    if names:
        found = [_pair(_FLAGS_OF_DATA.get(name, name), saved.get(name), fingerprint.get(name)) for name in names]
        raise CheckpointError(
            f"the data or its order differs from the checkpoint's: {'; '.join(found)}",
            "the files that the run began with, and the same blend, --split, --seed, --shuffle-window-blocks and --start-tokens",
            f"restore them, or {START_NEW}",
        )


def _same_data(name: str, then: Any, now: Any) -> bool:
    """Returns whether a part of the fingerprint is the same; a new stage may add corpora at the end."""
    if name == "corpora" and isinstance(then, list) and isinstance(now, list):
        return now[: len(then)] == then
    if name == "blend" and isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(
            a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-12) for a, b in zip(then, now, strict=True)
        )
    return _same_split(then, now) if name == "split" else bool(then == now)
