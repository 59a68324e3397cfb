"""What may change when a run is resumed: every option, one after the other, does what its mark says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os

import pytest

from megatron_patch.checkpoint.trainer_state import HeldOutName, TrainerState
from megatron_patch.config.option_types import AtResume, flag_of
from megatron_patch.config.resolve import load_config
from megatron_patch.config.values import RESUME_MARKS
from megatron_patch.errors import CheckpointError
from megatron_patch.stages import POSITION_WEIGHTS, Progress
from megatron_patch.training.resume import StartPoint, held_out_names, make_trainer_state
from megatron_patch.training.resume_checks import check_data, check_resume, progress_problems
from megatron_patch.training.stream import open_stream
from tests.distributed.runs import command, make_corpus

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16 --global-batch-size 12 --patch-size 4 "
    "--train-tokens 30720 --lr-decay-style constant --split 90,10,0 --eod-token-id 63 --save RUN"
)
SCALED = "--rope-scaling llama3 --rope-scaling-factor 8"
YARN = "--rope-scaling yarn --rope-scaling-factor 8"
MUON = "--optimizer muon"
EXPERTS = "--num-experts 4"
LIST = '--stages [{"patch_size":4,"token_share":0.5},{"patch_size":1}] --patch-size 1'

OTHER = {
    # name: (other words, words of both starts)
    "num_layers": "3", "hidden_size": "64", "num_attention_heads": "2", "model_family": "gpt2", "num_query_groups": "2", "kv_channels": "16",
    "ffn_hidden_size": "64", "vocab_size": "65", "make_vocab_size_divisible_by": "64", "max_position_embeddings": "32",
    "normalization": "LayerNorm", "norm_epsilon": "1e-4", "swiglu": "False", "position_embedding_type": "learned_absolute",
    "rotary_base": "5e5", "rope_scaling": ("linear", "--rope-scaling-factor 2 --rope-scaling llama3"),
    "rope_scaling_factor": ("4", SCALED), "rope_low_freq_factor": ("2", SCALED), "rope_high_freq_factor": ("5", SCALED),
    "rope_original_positions": ("4096", SCALED), "rope_beta_fast": ("16", YARN), "rope_beta_slow": ("2", YARN),
    "rope_attention_factor": ("1.5", YARN), "qk_layernorm": "True", "qk_norm_scope": ("all", "--qk-layernorm"),
    "geglu": "True", "zero_centered_norms": "True", "scale_embeddings": "True", "query_pre_attn_scalar": "9",
    "attn_logit_softcapping": "50", "final_logit_softcapping": "30", "norm_placement": "both", "windowed_rotary_base": ("500", "--window-size 7,0"), "no_rope_freq": "2", "window_size": "7,0",
    "window_attn_skip_freq": ("2", "--window-size 7,0"), "add_qkv_bias": "True", "disable_bias_linear": "False",
    "untie_embeddings_and_output_weights": "False", "init_method_std": "0.01",
    "num_experts": "4", "moe_ffn_hidden_size": ("48", EXPERTS), "moe_router_topk": ("3", EXPERTS), "moe_layer_freq": ("2", EXPERTS),
    "moe_shared_expert_intermediate_size": ("16", EXPERTS), "moe_router_score_function": ("sigmoid", EXPERTS),
    "moe_router_pre_softmax": ("True", EXPERTS), "moe_router_topk_scaling_factor": ("2", EXPERTS),
    "moe_router_enable_expert_bias": ("True", EXPERTS), "moe_router_bias_update_rate": ("0.01", f"{EXPERTS} --moe-router-enable-expert-bias"),
    "moe_router_load_balancing_type": ("none", EXPERTS), "moe_aux_loss_coeff": ("0.1", EXPERTS), "moe_z_loss_coeff": ("0.1", EXPERTS),
    "expert_model_parallel_size": ("2", EXPERTS),
    "recipe": "token-superposition", "patch_size": "2", "patch_fraction": "0.5", "patch_compute_share": "0.5",
    "stages": ('[{"patch_size":4,"token_share":0.25},{"patch_size":1}]', LIST), "train_tokens": "40000", "seq_length": "32",
    "sample": "constant-tokens", "batch": "constant-positions", "micro_batch_size": "2", "global_batch_size": "24",
    "global_batch_tokens": ("800", "--global-batch-size None --global-batch-tokens 192"), "position_weights": "power", "anneal_share": "0.5",
    "block_tokens": "128", "start_tokens": "64",
    "lr": "1e-3", "min_lr": "1e-5", "lr_warmup_tokens": "1000", "lr_warmup_steps": "7", "lr_warmup_fraction": "0.1",
    "lr_decay_style": "cosine", "lr_decay_tokens": "9000", "lr_decay_steps": "50", "lr_wsd_decay_tokens": ("2000", "--lr-decay-style WSD"),
    "lr_wsd_decay_steps": ("5", "--lr-decay-style WSD"), "lr_wsd_decay_fraction": ("0.25", "--lr-decay-style WSD"), "lr_wsd_decay_style": ("cosine", "--lr-decay-style WSD"),
    "optimizer": "registered-elsewhere", "decoupled_lr": "1e-3", "embedding_weight_decay": "0.2", "muon_lr": ("0.01", MUON),
    "muon_weight_decay": ("0.2", MUON), "muon_momentum": ("0.9", MUON), "muon_nesterov": ("False", MUON),
    "muon_scale_mode": ("shape_scaling", MUON), "muon_extra_scale_factor": ("1", MUON), "muon_num_ns_steps": ("6", MUON),
    "muon_coefficient_type": ("polar_express", MUON), "weight_decay": "0.2", "adam_beta1": "0.8", "adam_beta2": "0.9", "adam_eps": "1e-7", "clip_grad": "2",
    "data_path": "OTHER", "valid_data_path": ("OTHER", "--valid-data-path CORPUS"), "split": "80,20,0", "tokenizer_type": "NullTokenizer",
    "tokenizer_model": "elsewhere", "eod_token_id": ("62", "--eod-mask-loss"), "reset_attention_mask": "True", "reset_position_ids": "True",
    "eod_mask_loss": "True", "max_epochs": "100", "shuffle_window_blocks": "16", "num_workers": "0",
    "bf16": "True", "fp16": "True", "loss_scale": "8", "initial_loss_scale": "1024", "zero_stage": "0", "tensor_model_parallel_size": "2",
    "pipeline_model_parallel_size": "2", "pipeline_balance": "flops", "context_parallel_size": "2", "cp_comm_type": "all_gather",
    "sequence_parallel": ("True", "--tensor-model-parallel-size 2"), "deepspeed_config": "ds.json", "recompute_granularity": "full",
    "compile": "True", "operators": "plain", "seed": "9", "local_rank": "1", "distributed_timeout_minutes": "50",
    "save": "ELSEWHERE", "load": "RUN", "finetune": "True", "save_interval": "7", "save_interval_tokens": "700", "keep_last": "0",
    "keep_every": "5", "keep_every_tokens": "500", "async_save": "True", "exit_interval": "3",
    "exit_duration": "1h", "exit_margin": "10s", "kill_switch": "stop", "on_spike": "rewind", "spike_threshold": "10", "spike_window": "64",
    "spike_grad_norm": "5", "max_sick_steps": "3", "hang_timeout": "10min", "straggler_interval": "0", "check_replicas_interval": "5",
    "replay_interval": "5",
    "log_interval": "1", "eval_interval": "5", "eval_interval_tokens": "500", "eval_tokens": "1000", "sample_prompts": "once",
    "sample_tokens": "8", "sample_temperature": "1", "sample_top_p": "0.5", "tensorboard_dir": "charts", "wandb_project": "p",
    "wandb_exp_name": "n", "mlflow_experiment": "e", "mlflow_tracking_uri": ("http://host", "--mlflow-experiment e"),
    "mlflow_run_name": ("n", "--mlflow-experiment e"), "prometheus_file": "run.prom", "prometheus_port": "9400",
    "prometheus_address": "127.0.0.1", "profile": ("3-4", "--profile-nsys"), "profile_ranks": "1", "profile_shapes": "True",
    "profile_nsys": "True", "log_token_spans": "True", "peak_tflops": "100", "dry_run": "True", "world_size": ("2", "--dry-run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {"CORPUS": make_corpus(folder / "corpus"), "OTHER": make_corpus(folder / "other", seed=1)}


@pytest.fixture(scope="module")
def states(corpora):
    """Returns the trainer state of the base run with more words; each is made once."""
    return functools.cache(lambda more: saved(read(command(BASE, more), corpora)))


def read(words, corpora, ranks=4):
    words = [corpora.get(word, word) for word in words]
    if "--finetune" in words:
        words += ["--load", "ANOTHER"]
    return load_config([*words, "--data-path", corpora["CORPUS"]] if "--data-path" not in words else words, ranks)


def saved(run) -> TrainerState:
    """The trainer state of a run after five steps, as it is read back from a file."""
    fingerprint = open_stream(run, run.plan).fingerprint()
    state = make_trainer_state(run, StartPoint(run.plan, Progress(0, 0)), Progress(0, 5), fingerprint, {}, False, {})
    return TrainerState.from_json(json.loads(json.dumps(dataclasses.asdict(state))), "here")


def resume(state, run):
    resumed = check_resume(state, run)
    check_data(state, open_stream(run, resumed.plan).fingerprint())
    return resumed


@pytest.mark.parametrize("name", RESUME_MARKS)
def test_every_option_may_change_or_not_as_its_mark_says(name, corpora, states, monkeypatch):
    mark, entry = RESUME_MARKS[name], OTHER[name]
    assert mark is not None, "an option without a mark"
    value, both = entry if isinstance(entry, tuple) else (entry, "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: True)
    state = states(both)
    given = {"True": [flag_of(name)], "False": [flag_of("no_" + name)]}.get(value, [flag_of(name), value])
    run = read([*command(BASE, both), *given], corpora)
    if mark is AtResume.FIXED:
        with pytest.raises(CheckpointError) as refusal:
            resume(state, run)
        named = {"stages": "stage token", "data_path": "--data-path"}.get(name, flag_of(name))
        assert named in str(refusal.value)
    else:
        changes = resume(state, run).changes
        assert any(change.startswith(f"{flag_of(name)} ") for change in changes) == (mark is AtResume.REPORTED), changes


def test_all_differences_are_named_at_once(corpora):
    base = command(BASE)
    state = saved(read(base, corpora))
    more = "--hidden-size 64 --seq-length 32 --eod-mask-loss --optimizer adamw --seed 2 --patch-size 2 --split 1,1,0"
    with pytest.raises(CheckpointError) as refusal:
        check_resume(state, read([*base, *command(more)], corpora))
    pairs = {"hidden-size": "64 32", "seq-length": "32 16", "eod-mask-loss": "True False", "seed": "2 1234", "patch-size": "2 4"}
    for name, values in {**pairs, "split": "1,1,0 90,10,0"}.items():
        now, then = values.split()
        assert f"--{name} {now} (checkpoint: {then})" in refusal.value.what


def test_a_run_that_cannot_be_extended_is_refused_with_all_other_differences(corpora):
    base = command(BASE, "--lr-decay-style cosine --start-tokens 640 --block-tokens 128 --shuffle-window-blocks 4")
    state = saved(read(base, corpora))
    with pytest.raises(CheckpointError) as refusal:
        check_resume(state, read([*base, *command("--train-tokens 61440 --hidden-size 64 --seed 8")], corpora))
    for part in ("--hidden-size 64", "--seed 8", "--train-tokens 61440 (checkpoint: 30720)", "cannot be extended at 960 of 30,528 tokens"):
        assert part in refusal.value.what
    # 8 blocks are begun in windows of 4 blocks; the run itself started after 5 blocks.
    assert "--start-tokens 1664 --block-tokens 128" in refusal.value.do


def test_the_same_effect_in_other_words_is_no_change(corpora):
    base = command(BASE)
    run = read(base, corpora, ranks=1)
    state = saved(run)
    words = (
        "--split 9,1,0 --recipe patch-train --num-query-groups 4 --global-batch-size None --global-batch-tokens 192 --batch constant-tokens"
    )
    resumed = resume(state, read([*base, *command(words)], corpora, ranks=1))
    assert resumed.changes == () and resumed.plan == run.plan


def test_a_run_keeps_the_label_weights_of_the_version_that_began_it(corpora, monkeypatch):
    """Exponential weights were 2^-k; the checkpoint has them in its plan, and their name in its options."""
    words = [*command(BASE), "--position-weights", "exponential"]
    monkeypatch.setitem(POSITION_WEIGHTS, "exponential", lambda k: 2.0**-k)
    state = saved(read(words, corpora))
    monkeypatch.undo()
    before = [8 / 15 * 4, 4 / 15 * 4, 2 / 15 * 4, 1 / 15 * 4]
    assert state.plan["stages"][0]["position_weights"] == pytest.approx(before)
    run = read(words, corpora)
    assert run.plan.stages[0].position_weights[1] == pytest.approx(run.plan.stages[0].position_weights[0] / math.e)
    resumed = resume(state, run)
    assert list(resumed.plan.stages[0].position_weights) == state.plan["stages"][0]["position_weights"]
    (kept,) = resumed.changes
    sentence = "--position-weights exponential has another formula in new runs; stage patch keeps its weights"
    assert kept == f"{sentence} (2.133, 1.067, 0.5333, 0.2667)"
    # The checkpoints that follow have the same weights, and are resumed like the first one.
    later = make_trainer_state(run, StartPoint(resumed.plan, Progress(0, 5)), Progress(0, 6), state.data_fingerprint, {}, False, {})
    again = resume(TrainerState.from_json(json.loads(json.dumps(dataclasses.asdict(later))), "here"), run)
    assert again.plan == resumed.plan
    in_numbers = read([*command(BASE), "--position-weights", "8,4,2,1"], corpora)
    assert resume(state, in_numbers).plan == resumed.plan
    for other in ("uniform", f"1,{math.e**-1},{math.e**-2},{math.e**-3}"):
        with pytest.raises(CheckpointError, match="--position-weights"):
            resume(state, read([*command(BASE), "--position-weights", other], corpora))
    longer = resume(state, read([*words, "--train-tokens", "61440"], corpora))
    assert longer.plan.stages[0].position_weights == resumed.plan.stages[0].position_weights


def test_weights_of_a_formula_and_the_same_in_numbers_resume_each_other(corpora):
    """Numbers with 13 digits differ from the formula in the last bits, as math.exp of another C library does."""
    numbers = ",".join(f"{math.exp(-k):.13f}" for k in range(4))
    by_name, in_numbers = (read([*command(BASE), "--position-weights", given], corpora) for given in ("exponential", numbers))
    assert by_name.plan.stages[0].position_weights != in_numbers.plan.stages[0].position_weights
    state = saved(by_name)
    resumed = resume(state, in_numbers)
    assert resumed.plan == by_name.plan
    later = make_trainer_state(in_numbers, StartPoint(resumed.plan, Progress(0, 5)), Progress(0, 6), state.data_fingerprint, {}, False, {})
    again = resume(TrainerState.from_json(json.loads(json.dumps(dataclasses.asdict(later))), "here"), in_numbers)
    assert again.plan == by_name.plan and again.changes == ()


def test_weights_that_no_version_gave_a_name_are_refused(corpora):
    run = read([*command(BASE), "--position-weights", "exponential"], corpora)
    state = saved(run)
    state.plan["stages"][0]["position_weights"] = [3.7, 0.1, 0.1, 0.1]
    with pytest.raises(CheckpointError, match="does not follow"):
        resume(state, run)


def test_other_weights_of_held_out_corpora_are_reported(corpora):
    """Also equal weights in place of none, with which training reads the same."""

    def changes(then, now):
        return resume(saved(read([*command(BASE), *then.split()], corpora)), read([*command(BASE), *now.split()], corpora)).changes

    valid = "--valid-data-path 0.95 CORPUS 0.05 OTHER"
    (change,) = changes(valid, valid.replace("0.05", "0.5"))
    assert change.startswith("--valid-data-path 0.95 ") and ", now 0.95 " in change and " 0.5 " in change
    plain, equal = "--data-path CORPUS OTHER", "--data-path 2 CORPUS 2 OTHER"
    assert changes(equal, equal.replace("2 ", "1 ")) == () == changes(plain, plain)
    assert changes(plain, equal) == ("weights of --data-path, also for the held-out loss, not given, now given",)
    assert changes(plain + " " + valid, equal + " " + valid) == ()


def test_an_eod_token_matters_only_where_documents_are_separated(corpora):
    base = command(BASE)
    state = saved(read(base, corpora))
    assert resume(state, read([*base, "--eod-token-id", "62"], corpora)).changes == ()
    known = dataclasses.replace(state, data_metadata={"eod_id": 62})
    known.config["options"].update(eod_token_id=None, eod_mask_loss=True)
    with pytest.raises(CheckpointError, match=r"--eod-token-id 63 \(checkpoint: 62\)"):
        resume(known, read([*base, "--eod-mask-loss"], corpora))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stage_index": 7}, "stage_index is 7, but the plan has 2 stages"),
        ({"stage_index": -1}, None),
        ({"stage_step": 99999}, "stage_step is 99,999, but stage patch has 107 steps"),
        ({"step": 10**17}, "step is 100,000,000,000,000,000, but by the plan it is 5"),
        ({"consumed_tokens": 1}, "consumed_tokens is 1, but by the plan it is 960"),
        ({"consumed_samples": 0}, "consumed_samples is 0, but by the plan it is 15"),
        ({"plan": {}}, "the plan cannot be read"),
        ({"plan": {"stages": [], "block_tokens": 64}}, "the plan cannot be read"),
    ],
)
def test_a_place_that_is_not_in_the_plan_is_found(corpora, fields, reason):
    state = saved(read(command(BASE), corpora))
    assert progress_problems(state) == []
    forged = dataclasses.asdict(dataclasses.replace(state, **fields))
    if reason is None:
        with pytest.raises(CheckpointError):
            TrainerState.from_json(forged, "here")
    else:
        assert reason in progress_problems(TrainerState.from_json(forged, "here"))[0]


def test_a_plan_that_its_own_options_do_not_describe_is_refused(corpora):
    run = read(command(BASE), corpora)
    state = saved(run)
    state.plan["stages"][1]["steps"] = 10**18
    assert progress_problems(state) == []
    with pytest.raises(CheckpointError, match="does not follow from the options in it: it has .* tokens in place of 30,720"):
        check_resume(state, run)


@pytest.mark.parametrize(
    ("stage", "lr"),
    [
        ({}, {"lr": -1.0}), ({}, {"lr": 1e9}), ({}, {"warmup_tokens": -100}), ({}, {"warmup_tokens": 10**16}), ({}, {"decay_tokens": 0}),
        ({}, {"wsd_decay_tokens": -5}), ({}, {"style": "linear"}), ({"position_weights": [-3.0, 1.0, 1.0, 1.0]}, {}), ({"side": "input"}, {}),
        ({"anneal_share": -5.0}, {}), ({"rewarm_tokens": -9}, {}), ({"lr_policy": "continue"}, {}), ({"lr_policy": "rewarm"}, {}), ({"steps": 240}, {}), ({"steps": 24}, {}),
        ({"blend": [["@/etc/passwd", 1.0]]}, {}), ({"blend": [["x", -1.0]]}, {}), ({"global_batch_size": 6}, {}), ({"earlier_ends": [9999]}, {}),
    ],
)  # fmt: skip
def test_a_forged_plan_is_refused(corpora, stage, lr):
    """Values that the options in the checkpoint do not give; the place in the plan is made to fit."""
    run = read(command(BASE), corpora)
    state = saved(run)
    first = state.plan["stages"][0]
    first.update(stage)
    first["lr"].update(lr)
    if "position_weights" in stage:
        first["position_weights"] = stage["position_weights"]
    tokens = 5 * first["global_batch_size"] * 64
    state = dataclasses.replace(state, consumed_tokens=tokens, consumed_samples=5 * first["global_batch_size"])
    if progress_problems(state):
        return
    with pytest.raises(CheckpointError, match="does not follow"):
        check_resume(state, run)


@pytest.mark.parametrize(
    "options", [None, [], "text", {"lr": [1]}, {"stages": 5}, {"train_tokens": "many"}, {"seq_length": {"a": 1}}, {"recipe": "--help"}]
)
def test_forged_options_are_refused(corpora, options):
    run = read(command(BASE), corpora)
    state = saved(run)
    known = state.config["options"]
    state = dataclasses.replace(state, config={"options": {**known, **options} if isinstance(options, dict) else options})
    if isinstance(options, dict):
        with pytest.raises(CheckpointError):
            check_resume(state, run)
    else:
        assert progress_problems(state) == ["config has no options"]


def test_another_balance_of_experts_of_one_stage_is_reported(corpora):
    stages = [{"patch_size": 4, "token_share": 0.5, "moe_aux_loss_coeff": 0.5}, {"moe_router_bias_update_rate": 0.01}]
    base = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16 --global-batch-size 12 "
    base += f"--train-tokens 30720 {EXPERTS} --moe-router-enable-expert-bias --stages"
    state = saved(read([*command(base), json.dumps(stages)], corpora))
    stages[0]["moe_aux_loss_coeff"] = 0.25
    resumed = resume(state, read([*command(base), json.dumps(stages)], corpora))
    assert resumed.changes == ("stage patch-4: moe_aux_loss_coeff 0.5, now 0.25",)
    assert [stage.expert_balance.aux_loss_coeff for stage in resumed.plan.stages] == [0.25, 0.01]


def test_a_new_stage_may_add_a_corpus(corpora):
    """The corpora that were read keep their numbers, so the new one does not change the order of the data."""
    stages = [{"patch_size": 4, "tokens": 15360}, {"patch_size": 1, "tokens": 15360}]
    more = [*stages, {"patch_size": 1, "tokens": 1536, "data_path": corpora["OTHER"]}]
    base = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16 --global-batch-size 12 --stages"
    state = saved(read([*command(base), json.dumps(stages)], corpora))
    resumed = resume(state, read([*command(base), json.dumps(more)], corpora))
    assert resumed.changes == ("new stage 3-token, 8 steps",)
    assert resumed.plan.stages[2].blend == ((corpora["OTHER"], 1.0),)


def test_a_checkpoint_without_names_of_held_out_corpora_has_those_of_its_options(corpora, states):
    state = states("")
    assert state.held_out == () and held_out_names(None) == ()
    recorded = dataclasses.asdict(state)
    del recorded["held_out"]
    recorded["config"] = {"options": {**recorded["config"]["options"], "valid_data_path": ["1", "a/x/v", "2", "b/v"]}, "origins": {}}
    old = TrainerState.from_json(recorded, "here")
    assert [(one.name, one.path, one.tokens) for one in held_out_names(old)] == [
        ("x/v", os.path.realpath("a/x/v"), None),
        ("b/v", os.path.realpath("b/v"), None),
    ]
    recorded["held_out"] = [{"name": "v\x1b", "path": "/a/x/v", "tokens": 5}]
    assert held_out_names(TrainerState.from_json(recorded, "here")) == (HeldOutName("v\\x1b", "/a/x/v", 5),)
    recorded["held_out"] = [{"name": 5}]
    with pytest.raises(CheckpointError, match="held_out|HeldOutName"):
        TrainerState.from_json(recorded, "here")
