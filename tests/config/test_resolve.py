"""From flags to a run that can start, and every reason why one cannot, before torch is even imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_patch.config.resolve import load_config
from megatron_patch.data.dataset_metadata import DatasetMetadata, write_metadata
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.engine.deepspeed_config import batch_settings, resolve_engine_config
from megatron_patch.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent.parent
BASE = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "16",
    "--train-tokens",
    "8k",
    "--global-batch-size",
    "8",
]
RUN = [*BASE, "--vocab-size", "64", "--data-path", "nowhere"]
# The command of the README, without data.
PAPER = [
    "--num-layers",
    "24",
    "--hidden-size",
    "1024",
    "--num-attention-heads",
    "16",
    "--ffn-hidden-size",
    "2752",
    "--seq-length",
    "2048",
    "--micro-batch-size",
    "4",
    "--global-batch-tokens",
    "2M",
    "--patch-size",
    "4",
    "--patch-fraction",
    "0.667",
    "--train-tokens",
    "270B",
    "--lr",
    "3e-4",
    "--lr-warmup-tokens",
    "4B",
    "--bf16",
    "--zero-stage",
    "1",
    "--data-path",
    "my_text_document",
    "--save",
    "ckpt",
    "--load",
    "ckpt",
]


def resolve(*words, ranks=1):
    return load_config([*words], ranks)


def settings(run):
    return resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)


def test_families_decide_what_is_not_given():
    llama = resolve(*RUN).shape
    assert (llama.normalization, llama.activation, llama.position_embedding, llama.tie_embeddings) == ("RMSNorm", "swiglu", "rope", False)
    assert not llama.mlp_bias and not llama.qkv_bias and llama.ffn_hidden_size == 256 and llama.padded_vocab_size == 128
    gpt2 = resolve(*RUN, "--model-family", "gpt2").shape
    assert (gpt2.normalization, gpt2.activation, gpt2.position_embedding, gpt2.tie_embeddings) == ("LayerNorm", "gelu", "learned", True)
    assert gpt2.mlp_bias and gpt2.qkv_bias and gpt2.attention_bias and gpt2.ffn_hidden_size == 128
    qwen = resolve(*RUN, "--model-family", "qwen3", "--num-query-groups", "2", "--no-untie-embeddings-and-output-weights").shape
    assert qwen.qk_norm and qwen.num_query_groups == 2 and qwen.tie_embeddings


def test_the_metadata_file_gives_the_vocabulary(tmp_path):
    with IndexedDatasetWriter(str(tmp_path / "d"), np.dtype("uint16")) as writer:
        writer.append(np.arange(10, dtype=np.uint16), np.array([10]))
        writer.finish()
    write_metadata(str(tmp_path / "d"), DatasetMetadata("NullTokenizer", "77", 77, 76, 1, 10, "uint16", True, False, 1, 20, 62, "", ""))
    run = resolve(*BASE, "--data-path", str(tmp_path / "d"), "--eod-mask-loss")
    assert run.shape.vocab_size == 77 and run.eod_id == 76
    with pytest.raises(ConfigError, match="vocabulary of 77"):
        resolve(*BASE, "--data-path", str(tmp_path / "d"), "--vocab-size", "50")
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(DataError, match="not a dataset.s metadata file"):
        resolve(*BASE, "--data-path", str(tmp_path / "d"))


def test_a_step_that_micro_batches_make_larger_is_noted():
    words = [word for word in RUN if word not in ("--global-batch-size", "8")] + ["--global-batch-tokens", "128", "--patch-size", "4"]

    def notes(*more):
        return [note for note in resolve(*words, *more).notes if "--global-batch-tokens" in note]

    (note,) = notes("--micro-batch-size", "4")
    assert note.startswith("a step at K = 1 has 256 tokens instead of --global-batch-tokens 128") and "4 samples of 64 tokens" in note
    assert not notes("--micro-batch-size", "2")
    # Patches at constant positions take more tokens a step by design.
    assert not notes("--micro-batch-size", "2", "--recipe", "token-superposition")


def test_a_note_says_that_patches_lose_in_a_short_run_of_a_small_model():
    words = [*RUN, "--patch-size", "4", "--patch-fraction", "0.5"]
    at = words.index("--train-tokens") + 1

    def notes(tokens, *more):
        return [note for note in resolve(*words[:at], tokens, *words[at + 1 :], *more).notes if "with token-level training" in note]

    # λ = 0.5 and K = 4 cost 0.625; a step is 8 samples of 16 tokens.
    (note,) = notes(str(int(4_900 * 128 / 0.625)))
    assert "as much as 4,9" in note and not notes(str(int(5_100 * 128 / 0.625)))
    assert not any("with token-level training" in note for note in resolve(*RUN, "--recipe", "token-level").notes)


@pytest.mark.parametrize("recipe", ["token-superposition", "patch-train"])
def test_a_recipe_without_a_patch_size_takes_one_for_the_model(recipe):
    """PAPER's model has 369M parameters, RUN's a few thousand."""
    at = PAPER.index("--patch-size")
    large = resolve(*PAPER[:at], *PAPER[at + 2 :], "--recipe", recipe, "--dry-run")
    small = resolve(*RUN, "--recipe", recipe)
    assert [run.plan.stages[0].patch_size for run in (large, small)] == [run.options.stages.patch_size for run in (large, small)] == [4, 2]
    assert any(note.startswith("--patch-size 4") and note.endswith("by default, for a model of 369M parameters") for note in large.notes)
    given = resolve(*RUN, "--recipe", recipe, "--patch-size", "4")
    assert given.plan.stages[0].patch_size == 4 and not any("--patch-size" in note for note in given.notes)
    assert [stage.patch_size for stage in resolve(*RUN).plan.stages] == [1]


@pytest.mark.parametrize(
    "words", [["--recipe", "token-superposition", "--patch-size", "4"], ["--recipe", "token-level", "--lr-decay-style", "WSD"]]
)
def test_small_models_decay_longer_where_nothing_else_is_said(words):
    at = PAPER.index("--patch-size")
    assert PAPER[at + 2] == "--patch-fraction"
    paper = [*PAPER[:at], *PAPER[at + 4 :], "--dry-run"]

    def share(run):
        assert run.plan.stages[0].lr.style == "WSD"
        return run.plan.stages[0].lr.wsd_decay_tokens / run.plan.finest_stage.tokens_per_step / run.plan.steps

    large, small = resolve(*paper, *words), resolve(*RUN, *words)
    assert share(large) == pytest.approx(0.1, abs=1e-3) and share(small) == pytest.approx(0.5, abs=0.02)
    assert any("--lr-wsd-decay-fraction 0.1 by default, for a model of 369M parameters" in note for note in large.notes)
    for given in (
        ["--lr-wsd-decay-fraction", "0.25"],
        ["--lr-wsd-decay-tokens", str(small.plan.steps // 4 * small.plan.finest_stage.tokens_per_step)],
    ):
        run = resolve(*RUN, *words, *given)
        assert share(run) == pytest.approx(0.25, abs=0.05) and not any("by default" in note for note in run.notes)
    assert not any("by default" in note for note in resolve(*RUN).notes)
    own = "[{lr_decay_style: WSD, lr_wsd_decay_tokens: 128}]"
    assert not any("by default" in note for note in resolve(*RUN, "--stages", own).notes)


def test_positions_are_there_for_evaluation_where_no_stage_is_as_long():
    run = resolve(*RUN, "--model-family", "gpt2", "--stages", "[{patch_size: 4, sample: constant-tokens}]")
    assert run.plan.stages[0].positions == 4 and run.shape.max_positions == run.options.stages.seq_length == 16


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--hidden-size 30", "does not divide into 4 heads"),
        ("--num-query-groups 3", "query groups"),
        ("--kv-channels 3", "even head size"),
        ("--max-position-embeddings 8", "at least 16"),
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2"),
        ("--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2"),
        ("--sequence-parallel", "--sequence-parallel"),
        ("--bf16 --fp16", "one of them"),
        ("--lr-wsd-decay-fraction 0", "--lr-wsd-decay-fraction 0"),
        ("--lr-wsd-decay-fraction 1.5", "up to 1"),
        ("--lr-wsd-decay-fraction 0.2 --lr-wsd-decay-tokens 100", "one of them"),
        ("--save-interval 5", "--save FOLDER"),
        ("--save x --save-interval 5 --save-interval-tokens 100", "one of them"),
        ("--eval-interval 0", "--eval-interval 0"),
        ("--finetune", "--load"),
        ("--finetune --load x --save x", "another folder"),
        ("--log-token-spans", "--save FOLDER"),
        ("--reset-attention-mask", "end-of-document"),
        ("--adam-beta2 1.0", "below 1"),
        ("--clip-grad -1", "from 0"),
        ("--num-workers -1", "workers"),
        ("--world-size 8", "--dry-run"),
        ("--lr 0", "lr above 0"),
        ("--lr 1e-3 --min-lr 1e-2", "min_lr"),
        ("--start-tokens 7", "inside a block"),
        ("--global-batch-size 0", "--global-batch-size 0"),
        ("--block-tokens 0", "--block-tokens 0"),
        ("--num-query-groups 0", "whole numbers from 1"),
        ("--kv-channels 0", "whole numbers from 1"),
        ("--replay-interval 0", "--replay-interval 0"),
        ("--eval-interval 5 --eval-interval-tokens 100", "one of them"),
        ("--adam-eps -1", "above 0"),
        ("--weight-decay nan", "finite numbers"),
        ("--rotary-base inf", "finite numbers"),
        ("--window-size 4096", "write 4095,0 for a window of 4,096 positions"),
        ("--window-size 0", "LEFT,0 with LEFT from 0"),
        ("--window-size -1,0", "LEFT,0 with LEFT from 0"),
        ("--window-size 7,1", "LEFT,0 with LEFT from 0"),
        ("--window-size 1000000000,0", "LEFT from 0 to 999,999,999"),
        ("--window-attn-skip-freq 2", "--window-attn-skip-freq 2 without --window-size"),
        ("--window-size 7,0 --window-attn-skip-freq 0", "a whole number N from 1"),
        ("--window-size 7,0 --window-attn-skip-freq [1,2]", "a whole number N from 1"),
        ("--window-size 7,0 --window-attn-skip-freq [1]*3", "a list of 3\n  Allowed: 2, one for each of --num-layers"),
        ("--window-size 7,0 --window-attn-skip-freq [1]*99999", "a whole number N from 1"),
        ("--no-rope-freq __import__('os')", "a whole number N from 1"),
        ("--no-rope-freq 2 --model-family gpt2", "--no-rope-freq 2 with learned positions"),
        ("--no-rope-freq 2 --position-embedding-type learned_absolute", "--no-rope-freq 2 with learned positions"),
        ("--peak-tflops 0", "above 0"),
        ("--sample-top-p 0", "up to 1"),
        ("--mlflow-tracking-uri http://host", "--mlflow-tracking-uri without --mlflow-experiment"),
        ("--mlflow-run-name x", "give --mlflow-experiment NAME, or remove --mlflow-run-name"),
        ("--prometheus-file x.txt", "ends in .prom, because node_exporter reads no others"),
        ("--prometheus-port 65536", "whole numbers up to 65,535"),
        ("--profile 3", "--profile without --save"),
        ("--save x --profile 0", "counted from 1"),
        ("--save x --profile 5-4", "give --profile 10, or --profile 10-12"),
        ("--save x --profile 1-21", "up to 20 steps"),
        ("--save x --profile step", "--profile 'step'"),
        ("--save x --profile 3 --profile-ranks 0 4", "--profile-ranks 4"),
        ("--split 1,x", "up to three numbers"),
        ("--eod-token-id 64", "ids from 0 to 63"),
        ("--lr-decay-style inverse-square-root", "--lr-warmup-tokens"),
        ("--lr-decay-tokens 1k --lr-warmup-tokens 2k", "above the warm-up"),
        ("--lr-warmup-steps 5 --lr-warmup-tokens 80", "--lr-warmup-tokens together with --lr-warmup-steps"),
        ("--lr-warmup-steps -5", "is not a count"),
        ("--lr-decay-steps 0", "whole numbers from 1"),
        ("--lr-wsd-decay-steps 0", "whole numbers from 1"),
        ("--lr-wsd-decay-tokens 0", "whole numbers from 1"),
        ("--lr-warmup-steps 1e13", "whole numbers up to 1,000,000,000,000"),
        ("--optimizer muon --muon-momentum 1", "--muon-momentum 1.0"),
        ("--optimizer muon --muon-momentum -0.1", "numbers from 0 to below 1"),
        ("--optimizer muon --muon-momentum nan", "finite numbers"),
        ("--optimizer muon --muon-num-ns-steps 0", "whole numbers from 1"),
        ("--optimizer muon --muon-num-ns-steps 10000", "whole numbers up to 1,000"),
        ("--optimizer muon --muon-extra-scale-factor 0", "numbers above 0"),
        ("--optimizer muon --muon-lr 0", "numbers above 0"),
        ("--optimizer muon --muon-lr inf", "finite numbers"),
        ("--optimizer muon --muon-lr 1e308 --lr 1e-8", "a finite multiple of --lr"),
        ("--optimizer muon --muon-lr 0.01 --lr 0", "--lr above 0"),
        ("--optimizer muon --muon-weight-decay -1", "numbers from 0"),
        ("--decoupled-lr -1", "numbers above 0"),
        ("--decoupled-lr 1e-3 --lr 0", "--decoupled-lr 0.001 with --lr 0.0"),
        ("--embedding-weight-decay nan", "finite numbers"),
        ("--muon-lr 0.01", "--muon-lr with --optimizer adamw, which does not read it"),
        ("--muon-momentum 0.95 --no-muon-nesterov", "--muon-momentum, --muon-nesterov with --optimizer adamw"),
    ],
)
def test_what_cannot_run_is_refused(words, reason):
    with pytest.raises(ConfigError) as error:
        resolve(*RUN, *words.split())
    assert reason in str(error.value), str(error.value)


def test_all_problems_of_an_optimizer_are_reported_at_once():
    def begins(words):
        with pytest.raises(ConfigError) as error:
            resolve(*RUN, *words.split())
        return [" ".join(problem.error.what.split()[:4]) for problem in error.value.problems]

    numbers = "--muon-momentum 1 --adam-beta1 2 --adam-beta2 -1 --muon-extra-scale-factor 0 --train-tokens 0 --decoupled-lr 1e-3 --lr 0"
    assert begins(numbers) == [
        "--train-tokens 0",
        "--muon-momentum 1.0",
        "--muon-extra-scale-factor 0.0",
        "--adam-beta1 2.0",
        "--adam-beta2 -1.0",
    ]
    assert begins("--decoupled-lr 1e-3 --lr 0 --muon-lr 0.01") == [
        "--muon-lr 0.01 with --lr",
        "--decoupled-lr 0.001 with --lr",
        "--muon-lr with --optimizer adamw,",
    ]


def test_muon_s_options_of_a_file_are_given(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("muon-lr: 0.01\n")
    with pytest.raises(ConfigError, match=r"--muon-lr \(in .*run.yaml\) with --optimizer adamw") as error:
        resolve(*RUN, "--config", str(path))
    assert error.value.do.endswith("; on the command line, --muon-lr None takes back what the file sets")
    assert resolve(*RUN, "--config", str(path), "--optimizer", "muon").options.schedule.muon_lr == 0.01
    assert resolve(*RUN, "--config", str(path), "--muon-lr", "None").options.schedule.muon_lr is None


@pytest.mark.parametrize(
    ("words", "module", "package"),
    [
        ("--tensorboard-dir x", "tensorboard", "tensorboard"),
        ("--wandb-project x", "wandb", "wandb"),
        ("--mlflow-experiment x", "mlflow", "mlflow-skinny"),
        ("--prometheus-file x.prom", "prometheus_client", "prometheus-client"),
        ("--prometheus-port 9400", "prometheus_client", "prometheus-client"),
    ],
)
def test_what_is_logged_to_must_be_installed(monkeypatch, words, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    extra = re.split("[-_]", module)[0]
    with pytest.raises(ConfigError, match=rf"{words} needs {package}, which is not installed\n.*\[{extra}\]\n.*megatron_patch\[{extra}\]"):
        resolve(*RUN, *words.split())
    resolve(*RUN, *words.split(), "--dry-run")


def test_missing_data_and_vocabulary_are_notes(tmp_path):
    with pytest.raises(ConfigError, match="no data"):
        resolve(*BASE, "--vocab-size", "64")
    with pytest.raises(ConfigError, match="size of the vocabulary"):
        (tmp_path / "of_megatron.bin").touch()
        resolve(*BASE, "--data-path", str(tmp_path / "of_megatron"))
    with pytest.raises(DataError, match=r"--data-path: nowhere\.bin does not exist"):
        resolve(*BASE, "--data-path", "nowhere")


def write_json(tmp_path, data):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(data) if not isinstance(data, str) else data)
    return ["--deepspeed_config", str(path)]


def test_deepspeed_s_file_is_passed_through(tmp_path):
    user = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "train_batch_size": "auto",
        "comms_logger": {"enabled": True},
    }
    engine = settings(resolve(*RUN, *write_json(tmp_path, user)))
    assert (engine.precision, engine.zero_level, engine.clip_grad) == ("bf16", 2, 0.5)
    assert engine.deepspeed["zero_optimization"]["overlap_comm"] and engine.deepspeed["comms_logger"]["enabled"]
    assert engine.deepspeed["bf16"]["enabled"] and engine.deepspeed["data_types"]["grad_accum_dtype"] == "fp32"
    same = settings(resolve(*RUN, "--zero-stage", "2", "--bf16", *write_json(tmp_path, user)))
    assert same == engine


@pytest.mark.parametrize(
    ("user", "words", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "--zero-stage 1", "--zero-stage is 1"),
        ({"gradient_clipping": 2.0}, "--clip-grad 1.0", "gradient_clipping = 2.0"),
        ({"bf16": {"enabled": False}}, "--bf16", "bf16.enabled = False"),
        ({"fp16": {"enabled": True}}, "--bf16", "turn on both bf16 and fp16"),
        ({"train_batch_size": 99}, "", "train_batch_size = 99"),
        ({"optimizer": {"type": "Adam"}}, "", "optimizer"),
        ({"scheduler": {}}, "", "scheduler"),
        ({"zero_optimization": {"stage": 7}}, "", "stage is 7"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "", "offload_param"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "", "offload_optimizer"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "", "grad_accum_dtype"),
        ({"communication_data_type": "float32"}, "", 'communication_data_type is "float32"'),
        ({"communication_data_type": 32}, "", "communication_data_type is 32"),
        ({"communication_datatype": "fp32"}, "", "did you mean communication_data_type"),
        ({"gradient_allreduce_op": "sum"}, "", 'gradient_allreduce_op is "sum"'),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "--bf16", "bf16.bf16_master_weights_and_grads"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "--fp16", "fp16.fp16_master_weights_and_grads"),
        ({"zero_optimization": 3}, "", "JSON object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "", "JSON object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "", "none, cpu or nvme"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}, "", "nvme with ZeRO 2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "", "nvme_path is None"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": ""}}}, "", "nvme_path is ''"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_prefetch_bucket_size": 1000,
                    "offload_param": {"device": "nvme", "nvme_path": "/nvme"},
                }
            },
            "",
            "stage3_prefetch_bucket_size is 1000",
        ),
        ({"zero_optimizaton": {"stage": 2}}, "", "did you mean zero_optimization"),
        ({"bfloat16": {"enabled": True}}, "", "rename it to bf16"),
        ({"gradient_clipping": "1.0"}, "", 'gradient_clipping is "1.0"'),
        ({"fp16": {"enabled": "yes"}}, "", 'fp16.enabled is "yes"'),
        ("[1]", "", "contains a list"),
        ("{", "", "not valid JSON"),
        ({}, "--fp16 --zero-stage 0", "--fp16 with --zero-stage 0"),
    ],
)
def test_contradictions_end_with_both_values(tmp_path, user, words, reason):
    run = resolve(*RUN, *words.split(), *write_json(tmp_path, user))
    with pytest.raises(ConfigError) as error:
        settings(run)
    assert reason in str(error.value), str(error.value)


@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_summed_in_float32_unless_the_file_says_otherwise(tmp_path, precision, zero):
    if precision == "--fp16" and zero == 0:
        return
    run = resolve(*RUN, *precision.split(), "--zero-stage", str(zero))
    engine = settings(run)
    assert engine.deepspeed["communication_data_type"] == "fp32" and engine.communication_bytes == 4 and engine.notes == ()
    same = settings(
        resolve(*RUN, *precision.split(), "--zero-stage", str(zero), *write_json(tmp_path, {"communication_data_type": "FP32"}))
    )
    assert same == engine
    other = settings(
        resolve(*RUN, *precision.split(), "--zero-stage", str(zero), *write_json(tmp_path, {"communication_data_type": "bf16"}))
    )
    assert other.deepspeed["communication_data_type"] == "bf16" and other.communication_bytes == 2
    assert len(other.notes) == 1 and "in bf16" in other.notes[0]


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    ],
)
def test_other_settings_that_round_gradients_are_named(tmp_path, user, reason):
    (note,) = settings(resolve(*RUN, *write_json(tmp_path, user))).notes
    assert reason in note


def test_gradients_are_added_to_their_sums_at_once_unless_the_file_says_otherwise(tmp_path):
    for file, expected in ({}, True), ({"bf16": {"immediate_grad_update": False}}, False):
        engine = settings(resolve(*RUN, "--bf16", *write_json(tmp_path, file)))
        assert engine.deepspeed["bf16"] == {"immediate_grad_update": expected, "enabled": True}


def test_zero_2_does_not_divide_rounded_gradients_by_ranks_that_are_no_power_of_two():
    for zero, ranks, expected in (2, 3, True), (2, 6, True), (2, 4, False), (2, 1, False), (1, 3, False), (3, 3, False), (0, 3, False):
        engine = settings(resolve(*RUN, "--bf16", "--zero-stage", str(zero), "--global-batch-size", "12", ranks=ranks))
        assert engine.sums_gradients is expected


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        settings(resolve(*RUN, "--deepspeed_config", "nowhere.json"))


def test_batches_are_those_of_the_stage():
    run = resolve(*RUN, "--patch-size", "4", "--micro-batch-size", "1", ranks=2)
    patch, token = run.plan.stages
    assert batch_settings(patch, 2) == {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 2}
    assert batch_settings(token, 2) == {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "train_batch_size": 8}


def program(*words, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt_patch.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_dry_run_needs_neither_data_nor_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('a dry run imported torch')\n")
    result = program(*PAPER, "--dry-run", "--world-size", "64", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    for words in (
        "0.500 of token-level training",
        "patch",
        "token",
        "parameters",
        "FLOPs",
        '"zero_optimization"',
        "64: DP64 ZeRO 1",
        "(flag)",
    ):
        assert words in text, words
    assert "vocabulary assumed to be 32,000" in text


def test_wrong_flags_end_with_code_2_and_a_suggestion_even_in_a_dry_run():
    result = program(*PAPER, "--dry-run", "--patch-sizes", "4")
    assert result.returncode == 2 and "unknown flag --patch-sizes" in result.stderr and "patch-size" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_data_ends_with_code_3_and_no_traceback(tmp_path):
    result = program(*BASE, "--vocab-size", "64", "--data-path", str(tmp_path / "nowhere"))
    assert result.returncode == 3 and "nowhere.bin does not exist" in result.stderr and "Traceback" not in result.stderr
    assert program("--help").returncode == 0


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "examples" / "configs").glob("*.yaml"), *(ROOT / "examples" / "replicate").glob("*.yaml")]),
    ids=lambda path: path.stem,
)
def test_every_example_can_be_planned(path, tmp_path):
    training = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "study"}  # that section is for study.py
    config = tmp_path / path.name
    config.write_text(yaml.safe_dump(training, sort_keys=False))
    intended = re.search(r"on ([\d,]+) GPUs", path.read_text())
    run = resolve("--config", str(config), "--dry-run", ranks=int(intended[1].replace(",", "")) if intended else 8)
    stages = 1 if path.stem.startswith("study_") else 2  # a study's arms add theirs
    assert len(run.plan.stages) >= stages and settings(run).zero_level == 1
    assert run.plan.tokens == pytest.approx(run.options.stages.train_tokens, rel=0.03)


TENSOR = "--tensor-model-parallel-size 4"
LENGTHS = f"{TENSOR} --sequence-parallel --patch-size 8"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (f"{TENSOR} --num-attention-heads 2", r"--num-attention-heads 2 does not divide into 4 tensor-parallel ranks"),
        (f"{TENSOR} --ffn-hidden-size 90", r"--ffn-hidden-size 90 does not divide into 4 tensor-parallel ranks"),
        (
            "--tensor-model-parallel-size 6 --num-attention-heads 12 --num-query-groups 4 --hidden-size 48 --ffn-hidden-size 96",
            "groups 4 does not divide into 6",
        ),
        (f"{LENGTHS} --sample constant-tokens", r"over 4 ranks with 2 positions in stage 'patch'"),
        (f"{LENGTHS} --seq-length 18", r"over 4 ranks with 18 positions in stage 'patch'"),
        (f"{TENSOR} --sequence-parallel --patch-size 1 --seq-length 18", r"over 4 ranks with 18 positions in stage 'token'"),
    ],
)
def test_layouts_whose_parts_are_not_whole_are_refused(words, reason):
    ranks = int(words.split("--tensor-model-parallel-size ")[1].split()[0])
    with pytest.raises(ConfigError, match=reason):
        resolve(*RUN, *words.split(), ranks=ranks)


def test_every_stage_s_positions_divide_where_they_are_shared_out():
    assert [stage.positions for stage in resolve(*RUN, *LENGTHS.split(), ranks=4).plan.stages] == [16, 16]
    # Fewer groups than ranks are held as copies.
    assert resolve(*RUN, *TENSOR.split(), "--num-query-groups", "1", ranks=4).shape.num_query_groups == 1
