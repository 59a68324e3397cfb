"""Command lines of Megatron: what is translated, what has no effect, what is refused, and that all of it is reported at once."""

from __future__ import annotations

import json
import shlex

import pytest

from megatron_patch.cli.plan import main as plan
from megatron_patch.config.megatron.command_line import arguments, split
from megatron_patch.config.megatron.flags import Kind, key_of
from megatron_patch.config.megatron.translate import translate
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS, Given
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.config.values import KEYS
from megatron_patch.errors import ConfigError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.training.dry_run import architecture, print_megatron
from megatron_patch.training.pretrain import make_engine_config
from megatron_patch.utils.console import make_console
from tests.config.megatron_lists import GPT_1_3B, GPT_1_3B_JSON, LLAMA_2, LLAMA_2_JSON, LLAMA_3_8B, REFUSED_IN_LLAMA_3

MODEL = shlex.split("--num-layers 2 --hidden-size 64 --num-attention-heads 4")
BATCH = shlex.split("--seq-length 128 --global-batch-size 8 --micro-batch-size 1")
AROUND = split(BATCH)[1]
NO_LOSS = "--moe-router-load-balancing-type none"


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Messages are wrapped at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")


def options(words, *more):
    return parse([*MODEL, *BATCH, *more, *shlex.split(words)])


def translated(words):
    return translate([*AROUND, *split(shlex.split(words))[1]], KEYS)


def refusal(words):
    with pytest.raises(ConfigError) as error:
        options(words)
    return str(error.value)


def resolved(words, ranks, tmp_path, monkeypatch, settings=None):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    parsed = parse([*words, "--dry-run"])
    run = resolve(parsed, ranks)
    return run, make_engine_config(run)


def test_megatron_deepspeeds_llama_2_resolves_at_the_first_start(tmp_path, monkeypatch):
    run, engine = resolved(LLAMA_2, 8, tmp_path, monkeypatch, LLAMA_2_JSON)
    assert run.plan.tokens == 250_000 * 32 * 2048
    assert run.plan.stages[0].lr.warmup_tokens == 2000 * 32 * 2048
    assert run.options.logging.eval_tokens == 10 * 32 * 2048
    assert run.shape.num_query_groups == 4 and run.options.schedule.optimizer == "adamw"
    assert engine.precision == "bf16" and engine.zero_level == 0
    assert architecture(run) == (
        "family llama; RMSNorm (epsilon 1e-05); SwiGLU of width 5,504; rotary positions (base 10000); no biases; untied head; "
        "16 heads of 128 in 4 groups"
    )
    assert run.megatron.notes == ()  # everything that Megatron's defaults would make different is given


def test_megatron_deepspeeds_gpt_resolves_at_the_first_start_and_says_which_family_was_taken(tmp_path, monkeypatch):
    run, engine = resolved(GPT_1_3B, 16, tmp_path, monkeypatch, GPT_1_3B_JSON)
    assert run.plan.tokens == pytest.approx(300e9, rel=1e-3)
    assert run.options.engine.recompute_granularity == "full" and engine.precision == "fp16"
    assert run.options.safety.exit_duration is None
    family = run.megatron.notes[0]
    assert family.startswith("The model family is llama, the default, because neither --model-family nor --swiglu is given.")
    assert "--model-family gpt2" in family and "learned positions" in family
    chosen = resolved([*GPT_1_3B, "--model-family", "gpt2"], 16, tmp_path, monkeypatch, GPT_1_3B_JSON)[0]
    assert not any("family" in note for note in chosen.megatron.notes)
    assert "LayerNorm" in architecture(chosen) and "GELU" in architecture(chosen) and "tied head" in architecture(chosen)


def test_megatron_lms_llama_3_gets_one_report_and_what_remains_of_it_resolves(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as error:
        resolved(LLAMA_3_8B, 8, tmp_path, monkeypatch)
    report = str(error.value)
    assert all(flag in report for flag in REFUSED_IN_LLAMA_3) and "there is no FP8" in report
    assert "RMSNorm; Megatron's defaults are LayerNorm" in report
    remaining = shlex.split(error.value.do.partition("these here:\n")[2].replace("\\\n", " "))
    run, _ = resolved(remaining, 8, tmp_path, monkeypatch)
    assert run.plan.tokens == pytest.approx(1_953_125_000 * 8192, rel=1e-6)
    assert run.plan.stages[0].lr.decay_tokens == 1_949_218_748 * 8192
    assert run.options.safety.exit_duration == 235 * 60 and run.shape.num_query_groups == 8
    assert not any(flag.startswith(("--fp8", "--decoupled-min")) for flag in remaining)


@pytest.mark.parametrize(
    ("words", "here"),
    [
        ("--num-key-value-heads 2", "--num-query-groups 2"),
        ("--group-query-attention", "--num-query-groups 1"),
        ("--group-query-attention --num-query-groups 2", "--num-query-groups 2"),
        ("--checkpoint-activations", "--recompute-granularity full"),
        ("--recompute-activations", "--recompute-granularity selective"),
        ("--use-rotary-position-embeddings", "--position-embedding-type rope"),
        ("--rotary-seq-len-interpolation-factor 4", "--rope-scaling linear --rope-scaling-factor 4"),
        ("--use-rope-scaling", "--rope-scaling llama3 --rope-scaling-factor 8.0"),
        ("--use-rope-scaling --rope-scaling-factor 16", "--rope-scaling llama3 --rope-scaling-factor 16"),
        ("--layernorm-epsilon 1e-6", "--norm-epsilon 1e-6"),
        ("--rotary-position-embeddings-theta 500000", "--rotary-base 500000"),
        ("--normalization layernorm", "--normalization LayerNorm"),
        ("--position-embedding-type absolute", "--position-embedding-type learned_absolute"),
        ("--glu-activation swiglu", "--swiglu"),
        ("--pad-vocab-size-to 1000", "--make-vocab-size-divisible-by 1000"),
        ("--train-iters 10", "--train-tokens 10240"),
        ("--train-samples 1k", "--train-tokens 128000"),
        ("--train-samples 1000 --train-tokens 1000", "--train-tokens 1000"),
        ("--train-tokens 2M --train-samples 1000", "--train-tokens 128000"),
        ("--train-samples 1000 --train-tokens 2M", "--train-tokens 128000"),
        ("--lr-decay-iters 5", "--lr-decay-tokens 5120"),
        ("--lr-decay-samples 5", "--lr-decay-tokens 640"),
        ("--lr-warmup-iters 3", "--lr-warmup-steps 3"),
        ("--lr-warmup-iters 3 --lr-warmup-steps 4", "--lr-warmup-steps 4"),
        ("--lr-warmup-iters 3 --lr-warmup-tokens 1k", "--lr-warmup-tokens 1k"),
        ("--lr-warmup-samples 3 --lr-warmup-tokens 1k", "--lr-warmup-tokens 1k"),
        ("--lr-warmup-samples 3 --lr-warmup-steps 4", "--lr-warmup-steps 4"),
        ("--lr-decay-samples 3 --lr-decay-steps 4", "--lr-decay-steps 4"),
        ("--lr-wsd-decay-iters 3", "--lr-wsd-decay-steps 3"),
        ("--lr-warmup-fraction .001 --lr-decay-iters 1000", "--lr-warmup-tokens 1024 --lr-decay-tokens 1024000"),
        ("--lr-warmup-fraction .01 --train-iters 100", "--lr-warmup-fraction .01 --train-tokens 102400"),
        ("--lr-wsd-decay-style minus_sqrt", "--lr-wsd-decay-style minus-sqrt"),
        ("--optimizer adam", "--optimizer adamw"),
        ("--optimizer dist_muon", "--optimizer muon --zero-stage 1"),
        ("--optimizer dist_muon --zero-stage 2", "--optimizer muon --zero-stage 2"),
        ("--optimizer muon --muon-use-nesterov", "--optimizer muon --muon-nesterov"),
        ("--optimizer muon --muon-coefficient-type quintic", "--optimizer muon --muon-coefficient-type quintic"),
        ("--optimizer soap", "--optimizer soap"),
        ("--optimizer adam --muon-momentum 0.9 --muon-num-ns-steps 5", "--optimizer adamw"),
        ("--muon-momentum 0.9", "--muon-momentum 0.9"),
        ("--decoupled-lr 1e-3 --decoupled-min-lr 1e-4 --lr 1e-4 --min-lr 1e-5", "--decoupled-lr 1e-3 --lr 1e-4 --min-lr 1e-5"),
        ("--eval-iters 4", "--eval-tokens 4096"),
        ("--exit-duration-in-mins 90", "--exit-duration 90min"),
        ("--use-distributed-optimizer", "--zero-stage 1"),
        ("--use-distributed-optimizer --zero-stage 2", "--zero-stage 2"),
        ("--use-torch-fsdp2", "--zero-stage 3"),
        ("--use-distributed-optimizer --use-torch-fsdp2", "--zero-stage 3"),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "--zero-stage 2"),
        ("--tokenizer-type HFTokenizer", "--tokenizer-type HuggingFaceTokenizer"),
        ("--tokenizer-name-or-path gpt2", "--tokenizer-model gpt2"),
        ("--train-data-path 1 a 2 b", "--data-path 1 a 2 b"),
        ("--split '98, 1, 1'", "--split 98,1,1"),
        ("--kill-switch-path stop", "--kill-switch stop"),
        ("--save-retain-interval 500", "--keep-every 500"),
        ("--persistent-save-interval 5", "--save-interval 5"),
        ("--model-parallel-size 2 --sequence-parallel", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("--sequence-parallel --use-mcore-models", ""),
        ("--sequence-parallel", "--sequence-parallel"),
        ("--context-parallel-size 2 --cp-comm-type a2a", "--context-parallel-size 2 --cp-comm-type a2a"),
        ("--context-parallel-size 2 --cp-comm-type a2a a2a", "--context-parallel-size 2 --cp-comm-type a2a"),
        ("--context-parallel-size 2 --cp-comm-type all_gather", "--context-parallel-size 2 --cp-comm-type all_gather"),
        ("--context-parallel-size 2 --cp-comm-type allgather", "--context-parallel-size 2 --cp-comm-type all_gather"),
        ("--ds-sequence-parallel-size 4 --force-ds-sequence-parallel", "--context-parallel-size 4"),
        ("--batch-size 4", "--micro-batch-size 4"),
        ("--profile --profile-step-start 4 --profile-step-end 6", "--profile 5-6 --profile-nsys"),
        ("--profile pt --profile_steps 2,3", "--profile 2-3"),
        ("--profile 10-12", "--profile 10-12"),
        ("--use-rotary-position-embeddings --position-embedding-type learned_absolute", "--position-embedding-type rope"),
        ("--num-experts 8 --moe-grouped-gemm", f"--num-experts 8 {NO_LOSS}"),
        ("--num-experts 8", "--num-experts 8"),
        ("--num-experts 8 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0", f"--num-experts 8 {NO_LOSS}"),
        ("--num-experts 8 --moe-grouped-gemm --moe-aux-loss-coeff 0.0", f"--num-experts 8 {NO_LOSS}"),
        (
            "--num-experts 8 --moe-grouped-gemm --moe-router-load-balancing-type global_aux_loss",
            "--num-experts 8 --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0",
        ),
        *(
            (words, words)
            for words in (
                "--num-experts 8 --moe-aux-loss-coeff 0.01",
                "--num-experts 8 --moe-router-load-balancing-type global_aux_loss",
                "--num-experts 8 --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3",
                "--num-experts 8 --moe-router-score-function sigmoid --moe-router-topk 1",
            )
        ),
        (
            "--deepspeed --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type none",
            "--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type none",
        ),
        ("--num-experts 1 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-grouped-gemm", ""),
    ],
)
def test_flags_mean_here_what_they_mean_in_megatron(words, here):
    done = translated(words)
    assert arguments(done.flags[len(AROUND) :]) == here.split()
    assert not done.problems


def test_values_of_translated_flags_arrive():
    parsed = options("--num-key-value-heads 2 --train-iters 10 --checkpoint-activations --use-rope-scaling --exit-duration-in-mins 90")
    assert parsed.options.model.num_query_groups == 2 and parsed.options.stages.train_tokens == 10240
    assert parsed.options.engine.recompute_granularity == "full" and parsed.options.safety.exit_duration == 5400
    assert parsed.options.model.rope_scaling == "llama3" and parsed.options.model.rope_scaling_factor == 8.0
    assert parsed.origins["num_query_groups"] == "flag" and "num_key_value_heads" not in parsed.origins


@pytest.mark.parametrize(
    "words",
    [
        "--cp-comm-type p2p",
        "--rotary-percent 1.0",
        "--rotary-percent 1",
        "--attention-dropout 0 --hidden-dropout 0.0",
        "--deepspeed --use-flash-attn --use-mcore-models --no-masked-softmax-fusion",
        "--distributed-backend nccl",
        "--num-experts 1 --moe-min-capacity 4 --mlp-type standard",
        "--lr-warmup-init 0.0",
        "--hysteresis 2 --loss-scale-window 1000",
        "--override-opt_param-scheduler",
        "--weight-decay-incr-style constant",
        "--rampup-batch-size 8 8 1000",
        "--profile-step-start 4",
        "--exit-interval 0",
        "--no-load-optim",
        "--exit-duration-in-mins 30000000",
        "--eval-iters 0",
        "--lr-warmup-iters 0",
        "--muon-no-split-qkv --muon-tp-mode blockwise --muon-fp32-matmul-prec high --muon-scalar-optimizer lion",
        "--muon-momentum 0.9 --muon-use-nesterov --muon-scale-mode spectral --muon-coefficient-type cans --use-mcore-models",
        "--decoupled-min-lr 1e-4",
        "--moe-expert-capacity-factor 1.0 --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type aux_loss --moe-router-topk 2",
    ],
)
def test_values_that_change_nothing_are_accepted_and_listed(words):
    done = translated(words)
    assert [row.given.text.split()[0] for row in done.ignored] == [word for word in words.split() if word.startswith("--")]
    assert all(row.meaning for row in done.ignored)
    assert len(done.flags) == len(AROUND) and not done.problems and not done.rows


def test_what_has_no_effect_is_printed_with_the_reason(capsys):
    said = options("--rotary-percent 1.0 --use-flash-attn --no-position-embedding --position-embedding-type rope").megatron
    print_megatron(said, make_console())
    printed = capsys.readouterr().out
    assert "No effect" in printed and "--rotary-percent 1.0 (all dimensions of a head are rotated; this value changes nothing)" in printed
    assert "--use-flash-attn (the program and PyTorch choose the kernels)" in printed
    assert "--no-position-embedding (no learned positions" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--cp-comm-type p2p --context-parallel-size 2", "gather keys and values (all_gather), in all layers alike"),
        ("--cp-comm-type a2a all_gather --stages [{context-parallel-size:2}]", "in all layers alike"),
        ("--cp-comm-type a2a+p2p --ds-sequence-parallel-size 2", "in all layers alike"),
        ("--cp-comm-type elsewhere", "in all layers alike"),
        ("--hierarchical-context-parallel-sizes 2 2", "a2a+p2p"),
        ("--rotary-percent 0.5", "all dimensions of a head are rotated"),
        ("--attention-dropout 0.1", "there is no dropout"),
        ("--num-experts 8 16", "Megatron-DeepSpeed's experts have a capacity and drop tokens"),
        ("--num-experts 8 --deepspeed", "Megatron-DeepSpeed's experts have a capacity and drop tokens"),
        ("--topk 2 --num-experts 8", "belongs to Megatron-DeepSpeed's mixture of experts"),
        ("--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --num-experts 8", "depend on the micro-batch size"),
        ("--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --num-experts 8", "depend on the micro-batch size"),
        ("--moe-router-load-balancing-type sinkhorn --num-experts 8", "Sinkhorn's assignment"),
        ("--moe-router-load-balancing-type aux_loss global_aux_loss --num-experts 8", "one loss balances the load"),
        ("--moe-aux-loss-coeff 0.01 --num-experts 8 --moe-grouped-gemm", "Megatron's default type is aux_loss"),
        ("--moe-router-score-function sigmoid --moe-router-topk 1 --num-experts 8 --moe-grouped-gemm", "weighs an expert by its sigmoid"),
        *(
            (f"{words} --num-experts 8 --moe-router-topk 2", reason)
            for words, reason in (
                ("--expert-tensor-parallel-size 2", "each of them whole"),
                ("--moe-expert-capacity-factor 1.25", "no position is dropped or padded"),
                ("--moe-router-num-groups 4", "not among groups"),
                ("--moe-input-jitter-eps 0.01", "no noise"),
                ("--moe-router-force-load-balancing", "never at random"),
                ("--moe-use-upcycling", "a dense model's feed-forward layers"),
                ("--moe-apply-probs-on-input", "factors of what experts return"),
                ("--moe-router-dtype fp64", "float32"),
            )
        ),
        ("--num-layers-per-virtual-pipeline-stage 2", "interleaved (virtual) pipeline"),
        ("--fp8-format hybrid", "there is no FP8"),
        ("--position-embedding-type none", "a model without positions does not exist here"),
        ("--position-embedding-type relative", "there are no relative positions"),
        ("--position-embedding-type alibi", "there are no ALiBi positions"),
        ("--no-position-embedding", "a model without positions does not exist here"),
        ("--squared-relu", "GELU, SwiGLU or GeGLU"),
        ("--ds-sequence-parallel-size 4 --context-parallel-size 2", "together with --context-parallel-size 2"),
        ("--lr-warmup-init 1e-6", "the warm-up begins at 0"),
        ("--decoupled-min-lr 1e-5 --lr 1e-4 --min-lr 1e-5 --decoupled-lr 1e-3", "--min-lr x --decoupled-lr / --lr = 0.0001"),
        ("--muon-no-split-qkv --optimizer muon", "query, key and value projections are matrices of their own"),
        ("--muon-tp-mode blockwise --optimizer muon --tensor-model-parallel-size 2", "the update depends on the layout"),
        ("--muon-fp32-matmul-prec high --optimizer muon --bf16", "orthogonalized in bfloat16"),
        ("--muon-scalar-optimizer lion --optimizer muon", "AdamW steps all parameters that Muon does not"),
        ("--muon-coefficient-type cans --optimizer muon", "there are no such coefficients"),
        ("--rampup-batch-size 2 2 100", "the batch grows only from stage to stage"),
        ("--qk-layernorm --normalization LayerNorm", "RMSNorm"),
        ("--mock-data", "training reads a dataset"),
        ("--train-samples 5 --train-iters 5", "together with --train-iters"),
        ("--tokenizer-type BertWordPieceCase", "models that do not exist here"),
        ("--no-load-optim --load CKPT", "a resumed run continues"),
        ("--cpu-optimizer", "offload_optimizer"),
        ("--deepspeed yes", "'yes' belongs to no flag"),
        ("--train-iters", "without a value"),
        ("--start-weight-decay 0.1", "weight decay is constant"),
        ("--lr-warmup-iters soon", "not a whole number"),
        ("--decoupled-min-lr 1e-5 --decoupled-lr 1e-3", "--lr is missing, or one of both values is not a number"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(words, reason):
    problem, *_ = translated(words).problems
    assert reason in problem.meaning and problem.given.text.split()[0] == words.split()[0]
    assert problem.becomes and "did you mean" not in problem.becomes


def test_what_megatron_computes_alike_with_experts_is_accepted():
    """A command of Megatron-LM for Qwen3-30B-A3B's layers, with its kernels and its dispatcher."""
    words = """--num-experts 8 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-layer-freq ([0]*1+[1]*1) --moe-router-score-function softmax
        --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3 --moe-z-loss-coeff 1e-4 --moe-token-dispatcher-type alltoall
        --moe-grouped-gemm --moe-permute-fusion --moe-router-dtype fp32 --moe-per-layer-logging --expert-model-parallel-size 1
        --moe-token-drop-policy probs --overlap-moe-expert-parallel-comm --moe-router-fusion --expert-tensor-parallel-size 1
        --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --qk-layernorm --train-iters 5 --dry-run
        --vocab-size 100"""
    run = resolve(options(words), 1)
    assert run.shape.experts == ExpertShape(8, 2, 32, dense_layers=(0,))
    balance = run.plan.stages[0].expert_balance
    assert (balance.aux_loss_coeff, balance.z_loss_coeff, balance.bias_update_rate) == (1e-3, 1e-4, 0.0)
    ignored = " ".join(flags for flags, _ in run.megatron.ignored)
    assert all(f"--{flag}" in ignored for flag in ("moe-grouped-gemm", "moe-router-dtype fp32", "moe-token-dispatcher-type alltoall"))
    without = words.replace("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3", "")
    assert resolve(options(without), 1).plan.stages[0].expert_balance.aux_loss_coeff == 0.0
    own = "--num-experts 8 --train-tokens 8k --dry-run --vocab-size 100"
    assert resolve(options(own), 1).plan.stages[0].expert_balance.aux_loss_coeff == 0.01


def test_a_renamed_flag_may_repeat_the_one_of_this_program_but_not_contradict_it():
    assert not translated("--ds-sequence-parallel-size 4 --context-parallel-size 4").problems
    assert translated("--context-parallel-size 2 --ds-sequence-parallel-size 4").problems


def test_the_plan_says_what_became_of_megatrons_flags(capsys):
    plan([*MODEL, *BATCH, "--vocab-size", "100", "--train-iters", "100", "--deepspeed", "--world-size", "2", "--json"])
    printed = capsys.readouterr()
    assert "--train-tokens 102400" in printed.err and "--deepspeed (DeepSpeed is always used)" in printed.err
    assert json.loads(printed.out)


def test_one_refused_flag_is_an_error_in_three_parts():
    with pytest.raises(ConfigError) as error:
        options("--fp8-format hybrid")
    assert error.value.what.startswith("--fp8-format hybrid: there is no FP8") and "docs/migrating.md" in error.value.allowed
    assert error.value.do.startswith("write --bf16; the other flags are these here:")


def test_muon_with_megatrons_words_says_which_defaults_and_updates_differ():
    """All defaults of Megatron's Muon, and no more than these, are those of this program's options or are named with Megatron's value."""
    notes = " ".join(
        options("--optimizer muon --muon-tp-mode duplicated --no-swiglu --position-embedding-type learned_absolute").megatron.notes
    )
    for flag in ("--muon-momentum 0.9", "--no-muon-nesterov", "--muon-extra-scale-factor 1.0", "--muon-coefficient-type quintic"):
        assert f"({flag})" in notes
    assert "learned positions" in notes and "gate and the up" not in notes
    given = "--muon-momentum 0.9 --muon-use-nesterov --muon-extra-scale-factor 1 --muon-coefficient-type simple --swiglu"
    notes = " ".join(options(f"--optimizer muon {given}").megatron.notes)
    assert "gate and the up projection of SwiGLU each by itself" in notes and "quintic" not in notes and "Muon's momentum" not in notes
    assert options("--optimizer muon --muon-momentum 0.9 --decoupled-lr 1e-3").megatron is None
    notes = " ".join(options("--use-mcore-models --lr 1e-4 --min-lr 1e-5 --decoupled-lr 2e-4").megatron.notes)
    assert "2e-05 instead of 1e-05 as the lowest rate of word embeddings and head" in notes and "Muon" not in notes


def test_steps_need_a_batch_to_become_tokens():
    with pytest.raises(ConfigError) as error:
        parse([*MODEL, "--train-iters", "5"])
    assert "the tokens of a step are not known" in str(error.value) and "--global-batch-size" in str(error.value)


def test_all_problems_are_reported_at_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    message = refusal(
        "--num-experts 8 --topk 2 --moe-min-capacity 4 --lr fast --log-interval 0 --patchsize 2 --warp-drive 9 --zero-stage 7"
    )
    for part in (
        "--num-experts 8",
        "have a capacity",
        "mixture of experts",
        "remove them",
        "'fast' is not a number",
        "--log-interval 0",
        "--patch-size?",
        "--warp-drive 9",
        "unknown",
        "allowed: 0, 1, 2,",
    ):
        assert part in message, message
    table = message.partition("Note:")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80 and all(line.startswith("  ") for line in table)
    assert message.startswith("7 problems in the flags")


def test_contradictions_of_several_checks_are_reported_at_once():
    parsed = options("--finetune --eval-interval 5 --eval-interval-tokens 5 --lr-warmup-fraction 0.1 --lr-warmup-tokens 5 --dry-run")
    with pytest.raises(ConfigError) as error:
        resolve(parsed, 1)
    assert all(
        part in str(error.value) for part in ("--finetune without --load", "--eval-interval together", "--lr-warmup-tokens together")
    )
    with pytest.raises(ConfigError, match="2 problems"):
        resolve(options("--train-tokens 0 --adam-eps 0 --dry-run"), 1)


@pytest.mark.parametrize("words", ["--num-key-value-head 4", "--foo", "--fp8-hybrids", "--lr-warmup-hours 10", "--lr-decay-epochs 5"])
def test_an_unknown_flag_gets_no_guess_across_meanings(words):
    (row,) = translated(words).problems
    assert row.meaning.startswith("unknown") and row.becomes == f"remove {words.split()[0]}"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--layers 2", "--num-layers"),
        ("--patchsize", "--patch-size"),
        ("--num-layer", "--num-layers"),
        ("--Lr-Decay-Stile", "--lr-decay-style"),
        ("--bf6", "--bf16"),
    ],
)
def test_misspelt_flags_of_this_program_are_recognized(given, meant):
    (row,) = translated(given).problems
    assert meant in row.becomes and row.becomes.startswith("did you mean")


def test_a_control_character_in_a_value_does_not_reach_the_terminal():
    assert "\x1b" not in refusal("--foo \x1b[31mred --num-experts 8")


@pytest.mark.parametrize(
    ("given", "in_file", "steps", "tokens"),
    [
        *(("iters 3", unit, 3, 0) for unit in ("steps", "tokens", "iters", "samples")),
        *(("iters 0", unit, None, 0) for unit in ("steps", "tokens", "iters", "samples")),
        *(("samples 3", unit, None, 384) for unit in ("steps", "tokens", "iters", "samples")),
        *(("steps 4", unit, 4, 0) for unit in ("steps", "iters", "samples")),
        *(("tokens 7", unit, None, 7) for unit in ("tokens", "iters", "samples")),
    ],
)
def test_the_command_line_replaces_a_file_s_length_in_any_unit(tmp_path, given, in_file, steps, tokens):
    path = tmp_path / "run.yaml"
    model = "num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nglobal-batch-size: 8\nseq-length: 128\n"
    path.write_text(f"{model}lr-warmup-{in_file}: 5\n")
    unit, number = given.split()
    schedule = parse(["--config", str(path), f"--lr-warmup-{unit}", number]).options.schedule
    assert (schedule.lr_warmup_steps, schedule.lr_warmup_tokens) == (steps, tokens)


def test_keys_of_a_file_go_through_the_same_table(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "num-layers: 2\nhidden-size: 64\nnum_attention_heads: 4\nnum-key-value-heads: 2\nglobal-batch-size: 8\nseq-length: 128\n"
        "train-iters: 10\ndeepspeed: true\nuse-flash-attn: false\nnormalization: rmsnorm\nsplit: [98, 1, 1]\n"
    )
    parsed = parse(["--config", str(path)])
    assert parsed.options.model.num_query_groups == 2 and parsed.options.stages.train_tokens == 10 * 8 * 128
    assert parsed.origins["train_tokens"] == parsed.origins["num_query_groups"] == str(path)
    over = parse(["--config", str(path), "--train-tokens", "5", "--global-batch-size", "4"])
    assert over.options.stages.train_tokens == 5
    assert parse(["--config", str(path), "--global-batch-size", "4"]).options.stages.train_tokens == 10 * 4 * 128
    assert parse(["--config", str(path), "--train-iters", "1"]).options.stages.train_tokens == 8 * 128
    path.write_text(path.read_text() + "lr-warmup-tokens: 1k\n")
    schedule = parse(["--config", str(path), "--lr-warmup-iters", "3"]).options.schedule
    assert (schedule.lr_warmup_steps, schedule.lr_warmup_tokens) == (3, 0)
    path.write_text(path.read_text() + "fp8-format: hybrid\nbf16: maybe\nlayers: 5\nlr: fast\n")
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(path)])
    assert all(part in str(error.value) for part in ("there is no FP8", "'maybe' is no switch", "layers 5 in", "'fast' is not a number"))


def test_a_command_line_in_our_words_says_nothing_of_megatron():
    parsed = options("--train-tokens 1M --lr 1e-3 --normalization LayerNorm")
    assert parsed.megatron is None


def test_differences_from_megatrons_defaults_are_said():
    notes = " ".join(options("--deepspeed --swiglu").megatron.notes)
    assert "The model has RMSNorm, rotary positions, no biases, an untied head" in notes
    assert "--normalization LayerNorm" in notes and "--no-disable-bias-linear" in notes
    assert "weight decay 0.1 instead of 0.01 (--weight-decay 0.01)" in notes and "cosine decay instead of linear" in notes
    assert "no dropout instead of 0.1" in notes
    assert "--ffn-hidden-size is 256 by default; Megatron's default is 128" in notes
    decay = " ".join(options("--lr-decay-style WSD --lr-wsd-decay-iters 1").megatron.notes)
    assert "linear final decay instead of exponential (--lr-wsd-decay-style exponential)" in decay
    assert "Megatron's default is 256" not in " ".join(options("--glu-activation swiglu --hidden-size 64").megatron.notes)
    groups = " ".join(options("--use-mcore-models --num-query-groups 2").megatron.notes)
    assert "Megatron-LM reads --num-query-groups only together with --group-query-attention" in groups


@pytest.mark.parametrize(
    ("words", "steps", "nsys"),
    [
        ("--profile --use-pytorch-profiler", "11-12", False),
        ("--profile --profile-step-start 4 --profile-step-end 6", "5-6", True),
        ("--profile pt --profile_steps 4,6", "4-6", False),
        ("--profile pt", "2-3", False),
        ("--profile 7", "7", False),
    ],
)
def test_steps_to_profile_are_those_of_megatron(words, steps, nsys):
    logging = options(f"--save x --profile-ranks 0 1 {words}").options.logging
    assert (logging.profile, logging.profile_nsys, logging.profile_ranks) == (steps, nsys, (0, 1))


def test_every_flag_of_the_table_has_one_of_the_outcomes():
    """Accepted, translated to flags that exist, or refused with a reason."""
    for flag in MEGATRON_FLAGS.values():
        assert flag.text, flag.name
        named = {key_of(word.rstrip(",")) for word in flag.here.split() if word.startswith("--") and word != "--config"}
        assert named <= KEYS | set(MEGATRON_FLAGS), flag
        if flag.kind in (Kind.SAME, Kind.VALUES):
            assert flag.key in KEYS, flag
        elif flag.key in KEYS:
            raise AssertionError(f"{flag.name} is a flag of this program, too")
        if flag.kind is Kind.RENAMED:
            assert named and named <= KEYS, flag
        if flag.kind is Kind.DETAIL:
            assert flag.here in MEGATRON_FLAGS, flag


@pytest.mark.parametrize("kind", list(Kind))
def test_every_flag_is_answered_by_its_kind(kind):
    """Each flag of the table, given alone with some value, is translated, listed or refused by name; none is called unknown."""
    for flag in MEGATRON_FLAGS.values():
        if flag.kind is not kind:
            continue
        given = Given(flag.key, () if flag.values == 0 else (flag.harmless[:1] or ("1",)))
        done = translate([*AROUND, given], KEYS)
        assert not any("unknown" in row.meaning for row in done.problems), flag
        assert {*(name.key for name in done.flags)} <= KEYS
        answers = [row.given.key for row in (*done.rows, *done.ignored, *done.problems)]
        assert flag.key in answers or any(one is given for one in done.flags), flag
        if kind in (Kind.IGNORED, Kind.DETAIL):
            assert done.flags == AROUND and not done.problems, flag
