"""tools/migrate.py: scripts are evaluated without being run, and what is written means what the script means."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_patch.cli.migrate import main
from megatron_patch.cli.migrate_deepspeed import divide
from megatron_patch.cli.shell_script import evaluate
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.errors import ConfigError
from tests.config.megatron_lists import GPT_1_3B, GPT_1_3B_JSON, LLAMA_2, LLAMA_2_JSON, LLAMA_3_8B

SCRIPT = """#!/bin/bash
set -ex
TP=${TP:-2}          # a comment
LAYERS=$((2 * TP))
SEQ=128
MODE="small"
DATA="1 data/books"
if [ "$MODE" = "large" ]; then HIDDEN=4096; elif [[ $MODE == small ]] && [ $TP -gt 1 ]; then
  HIDDEN=64
else
  HIDDEN=1
fi
cat <<EOT > ${OUT_DIR:-out}/ds.json
{"train_batch_size": $((SEQ / 16)), "zero_optimization": {"stage": 1, "allgather_bucket_size": 1000}, "bf16": {"enabled": true}}
EOT
MODEL_ARGS=(
    --num-layers $LAYERS   # layers
    --hidden-size $HIDDEN
    # --num-experts 8
    "--num-attention-heads 4"
)
MODEL_ARGS+=(--seq-length $SEQ --max-position-embeddings $SEQ)
for rank in 1 2 3; do TP=9; done
options=" --train-iters 10 \\
    --lr 1e-3 \\
    --save ${SAVE_DIR} "
run="torchrun --nproc_per_node 4 --nnodes 2 pretrain_gpt.py ${MODEL_ARGS[@]} $options"
eval $run --tensor-model-parallel-size $TP --data-path $DATA --micro-batch-size 1 --deepspeed --deepspeed_config=out/ds.json "$@" 2>&1 | tee log
"""


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Messages are wrapped at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")


def migrate(tmp_path, *arguments):
    """The file as a mapping, and its text."""
    main([*arguments[:1], "--output", str(tmp_path / "run.yaml"), *arguments[1:]] if arguments[0] != "--" else arguments)
    text = (tmp_path / "run.yaml").read_text()
    return yaml.safe_load(text), text


def run_of(tmp_path, ranks):
    """The run that the file describes, without its data."""
    text = "".join(
        line for line in (tmp_path / "run.yaml").read_text().splitlines(True) if not line.startswith(("data-path", "deepspeed-c"))
    )
    (tmp_path / "check.yaml").write_text(text)
    return resolve(parse(["--config", str(tmp_path / "check.yaml"), "--dry-run"]), ranks)


def test_a_script_is_evaluated_and_never_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(SCRIPT + "\ntouch $(touch made) `touch made`; touch made\n")
    values, text = migrate(tmp_path, "run.sh", "--deepspeed-output", "left.json", "--set", "2=x")
    assert not Path("made").exists() and not Path("out").exists()
    assert values["num-layers"] == 4 and values["hidden-size"] == 64 and values["num-attention-heads"] == 4
    assert values["global-batch-size"] == 8 and values["train-tokens"] == 10 * 8 * 128
    assert values["data-path"] == [1, "data/books"] and values["bf16"] is True and values["zero-stage"] == 1
    assert json.loads(Path("left.json").read_text()) == {"zero_optimization": {"allgather_bucket_size": 1000}}
    assert values["deepspeed-config"] == "left.json"
    assert "train-tokens: 10240  # from --train-iters 10: 10 steps x 1,024 tokens" in text
    assert "global-batch-size: 8  # from DeepSpeed's JSON, train_batch_size" in text
    assert "# save: ${SAVE_DIR}  # fill in: no value for ${SAVE_DIR}" in text and "num-experts" not in text
    said = capsys.readouterr().err
    assert "to fill in: no value for ${SAVE_DIR}" in said and "left out: for rank" in said
    assert "Checked as a dry run on 8 ranks: family gpt2; LayerNorm" in said


def test_variables_are_set_from_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(SCRIPT.replace('DATA="1 data/books"', "DATA=$1"))
    values, _ = migrate(
        tmp_path, "run.sh", "--set", "TP=4", "--set", "1=data/web", "--set", "SAVE_DIR=my run", "--deepspeed-output", "d.json"
    )
    assert values["tensor-model-parallel-size"] == 4 and values["num-layers"] == 8
    assert values["data-path"] == ["data/web"]
    with pytest.raises(ConfigError, match="--set TP"):
        main(["run.sh", "--set", "TP"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1; B=${A}2; x.py $B", ["12"]),
        ("x.py ${A:-d} ${A-e} ${A:+f}", ["d", "e"]),
        ("A=v; x.py ${A:-d} ${A:+f} '$A' \"$A $A\" \\$A", ["v", "f", "$A", "v v", "$A"]),
        ('A=(1 "2 3" 4); x.py "${A[@]}"', ["1", "2 3", "4"]),
        ('A=(1 "2 3"); x.py ${A[@]}', ["1", "2", "3"]),
        ("A=(1); A+=(2 3); B='a '; B+=b; x.py ${A[*]} $B", ["1", "2", "3", "a", "b"]),
        ("N=8; x.py $((N*2)) $(( (N + 1) / 2 )) $((N % 3)) $((${N} - 10))", ["16", "4", "2", "-2"]),
        ('x.py "$@" end', ["end"]),
        ("A=5\nif [ $A -ge 5 ]; then B=y; else B=n; fi\nx.py $B", ["y"]),
        ('if [ -n "${NONE}" ]; then B=y; else B=n; fi; x.py $B', ["n"]),
        ("[ 1 -eq 1 ] && B=y; [ 1 -eq 2 ] && B=n; x.py $B", ["y"]),
        ("if [ 1 = 2 ]; then\n if [ 1 = 1 ]; then B=a; fi\nelse\n B=b\nfi; x.py $B", ["b"]),
        ("if [[ 1 == 1 && 2 == 3 ]]; then B=a; elif [ 1 = 1 -a 2 -lt 3 ]; then B=b; fi; x.py $B", ["b"]),
        ('if ! [ 1 = 2 ] || [ 1 = 3 ]; then B=a; fi; x.py ${B} ${C:-"d e"}', ["a", "d e"]),
        ("function f() { B=no; }\nB=yes\nx.py $B", ["yes"]),
        ("case $1 in a) B=1;; *) B=2;; esac\nB=3; x.py $B", ["3"]),
        ("x.py a \\\n  b # c\n", ["a", "b"]),
        ("x.py pre$(date)post", ["pre${date}post"]),
        ("export A=1 B=2; x.py $A$B", ["12"]),
        ("x.py $((1 << 70)) $((NONE * 2))", ["${1<<70}", "${NONE*2}"]),
    ],
)
def test_words_are_those_that_bash_would_make(text, words):
    command = next(command for command in evaluate(text).commands if command[0] == "x.py")
    assert command[1:] == words
    if not any("${" in word for word in words):  # bash has no parts without a value
        program = "x.py() { printf '%s\\n' \"$@\"; }\n" + text
        bash = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
        assert bash.stdout.splitlines() == words, bash.stderr


@pytest.mark.parametrize(
    "text",
    ["A='", 'x.py "a', "x.py ${A", "x.py $(( ", "fi; done; esac; }", "A=(", "cat <<E\n", "`", "$", "if; then; fi", "if ! ; then x; fi"],
)
def test_a_broken_script_ends_without_a_traceback(text):
    evaluate(text)


@pytest.mark.parametrize(
    ("text", "what"), [("${a:-" * 5000, "nested too deeply"), ("a=aaaa\n" + "a=$a$a\n" * 60, "variable a is too long")]
)
def test_a_script_that_grows_without_end_is_refused(text, what):
    with pytest.raises(ConfigError, match=what):
        evaluate(text)


@pytest.mark.parametrize(
    ("words", "settings", "ranks", "family"),
    [(LLAMA_2, LLAMA_2_JSON, 8, "llama"), (GPT_1_3B, GPT_1_3B_JSON, 16, "gpt2"), (LLAMA_3_8B, None, 8, "llama")],
)
def test_the_three_public_lists_resolve(tmp_path, monkeypatch, capsys, words, settings, ranks, family):
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps(settings))
    Path("list.txt").write_text(shlex.join(words))
    extra = ["--deepspeed-output", "left.json"] if settings is GPT_1_3B_JSON else []
    values, text = migrate(tmp_path, "list.txt", "--world-size", str(ranks), *extra)
    assert values["model-family"] == family and f"Checked as a dry run on {ranks} ranks: family {family}" in capsys.readouterr().err
    shape = run_of(tmp_path, ranks).shape
    if words is GPT_1_3B:
        kinds = (shape.normalization, shape.activation, shape.position_embedding, shape.mlp_bias, shape.tie_embeddings)
        assert kinds == ("LayerNorm", "gelu", "learned", True, True)
        assert values["initial-loss-scale"] == 2048 and json.loads(Path("left.json").read_text()) == {"fp16": {"loss_scale_window": 500}}
        assert "#   --hidden-dropout 0.1: there is no dropout" in text  # Megatron's default
    elif words is LLAMA_3_8B:
        assert (shape.normalization, shape.activation, shape.mlp_bias) == ("LayerNorm", "swiglu", False)
        assert "#   --fp8-format hybrid: there is no FP8" in text and values["bf16"] is True and float(values["decoupled-lr"]) == 5e-4
        assert "normalization: LayerNorm  # Megatron's default" in text
    else:
        assert shape.normalization == "RMSNorm" and values["train-tokens"] == 250_000 * 32 * 2048


def test_megatrons_defaults_are_written_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 --train-samples 100 --swiglu"
    Path("list.txt").write_text(words)
    values, _ = migrate(tmp_path, "list.txt", "--world-size", "4")
    assert values["global-batch-size"] == 8 and values["weight-decay"] == 0.01 and values["adam-beta2"] == 0.999
    assert values["lr-decay-style"] == "linear" and values["ffn-hidden-size"] == 256 and values["eval-tokens"] == 100 * 8 * 64
    assert values["disable-bias-linear"] is False and values["untie-embeddings-and-output-weights"] is False


def test_experts_without_a_coefficient_get_no_auxiliary_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = """--num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 --train-samples 100 --swiglu
        --normalization RMSNorm --disable-bias-linear --use-rotary-position-embeddings --num-experts 4 --moe-router-topk 2"""
    Path("list.txt").write_text(words)
    values, _ = migrate(tmp_path, "list.txt", "--world-size", "4")
    assert values["num-experts"] == 4 and values["moe-router-load-balancing-type"] == "none"
    Path("run.yaml").unlink()
    Path("list.txt").write_text(f"{words} --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.02")
    values, _ = migrate(tmp_path, "list.txt", "--world-size", "4")
    assert values["moe-router-load-balancing-type"] == "global_aux_loss" and values["moe-aux-loss-coeff"] == 0.02


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--num-experts 8 --topk 2", "have a capacity and drop tokens"),
        ("--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01", "depend on the micro-batch size"),
        ("--position-embedding-type alibi --embed-layernorm", "there are no ALiBi positions"),
        ("--squared-relu", "GELU or SwiGLU"),
        ("--qk-layernorm", "RMSNorm"),  # with Megatron's default LayerNorm
        ("--multi-latent-attention", "latent"),
        ("--apply-residual-connection-post-layernorm", "pre-LN"),
    ],
)
def test_another_model_is_refused_with_what_is_missing(words, reason):
    base = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --global-batch-size 8 --train-iters 5"
    with pytest.raises(ConfigError) as error:
        main(["--", *base.split(), *words.split()])
    assert reason in re.sub(r"\s+", " ", str(error.value)) and "trains another model" in error.value.what


def test_arguments_without_what_a_run_needs_end_with_what_is_missing(capsys):
    with pytest.raises(ConfigError, match="does not resolve") as error:
        main(["--", "--num-layers", "2", "--hidden-size", "64", "--train-iters", "5", "--global-batch-size", "8"])
    assert "--num-attention-heads" in error.value.what
    assert "num-layers: 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no arguments"):
        main([])
    with pytest.raises(ConfigError, match="check the path"):
        main(["nowhere.sh"])


def test_flags_without_values_are_named_as_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(
        "python pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-key-value-heads $KV --vocab-file $1 "
        "--train-iters $ITERS --global-batch-size 8 --seq-length 64 > log\n"
    )
    with pytest.raises(ConfigError, match="train-iters without a value, so the file was not checked"):
        migrate(tmp_path, "run.sh")
    text = Path("run.yaml").read_text()
    assert "# num-query-groups: ${KV}  # fill in: no value for ${KV}" in text and "# train-iters: ${ITERS}" in text
    assert "vocab-file" not in text and all(len(line) < 120 for line in capsys.readouterr().err.splitlines() if "Note" not in line)


@pytest.mark.parametrize(
    "start",
    [
        "eval $run &> log/out.log",
        'srun --wait=60 bash -c "$LAUNCHER $CMD" 2>&1 | tee log',
        "srun bash -c '$LAUNCHER $CMD' 2>&1 | tee log",
        "CUDA_VISIBLE_DEVICES=0 $LAUNCHER $CMD",
    ],
)
def test_ways_to_start_a_program(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    arguments = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --train-iters 3 --global-batch-size 8 --seq-length 64"
    Path("run.sh").write_text(
        'LAUNCHER="python -u -m torch.distributed.run --nproc_per_node 2"\nexport CMD=" `pwd`/pretrain_gpt.py '
        f'{arguments} "\nrun="deepspeed --num_gpus 2 pretrain_gpt.py {arguments} --deepspeed &> log.txt"\necho $run\n{start}\n'
    )
    values, text = migrate(tmp_path, "run.sh")
    assert values["train-tokens"] == 3 * 8 * 64 and "--world-size 2" in text


MODEL = "--num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 --global-batch-size 8 --train-iters 5"


def test_placeholders_of_public_scripts_are_to_be_filled_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(
        f'#SBATCH <OPTIONS> --nodes=2\nDATA="0.4 <FIRST DATASET> 0.6 <SECOND>"\noptions=" {MODEL} --data-path $DATA --save <CHECKPOINTS> '
        '--load <CHECKPOINTS> --bf16"\nsrun sh -c "python pretrain_gpt.py $options" <in.txt >out.txt\n'
    )
    values, text = migrate(tmp_path, "run.sh", "--set", "SECOND=b", "--set", "CHECKPOINTS=my")
    assert values["bf16"] is True and values["save"] == values["load"] == "my" and "data-path" not in values
    assert "# data-path: 0.4 ${FIRST_DATASET} 0.6 b  # fill in" in text and "no value for ${FIRST_DATASET}" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["|& tee out.log", "| tee out.log", "&& echo done", "; echo done", "&", ">& out.log", "2>&1"])
def test_what_follows_a_command_is_no_value_of_its_last_flag(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(f'run="python pretrain_gpt.py {MODEL} --adam-beta2 0.95"\nrun="$run {end}"\neval $run\n')
    assert migrate(tmp_path, "run.sh")[0]["adam-beta2"] == 0.95


def test_the_command_for_a_check_has_enough_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = "--tensor-model-parallel-size 4 --pipeline-model-parallel-size {}"
    for pipeline, ranks in (("2", 8), ("4", 16)):
        Path("run.sh").write_text(
            f"torchrun --nnodes $N --nproc_per_node 8 pretrain_gpt.py {MODEL} --num-layers 4 {layout.format(pipeline)}\n"
        )
        assert f"--world-size {ranks}\n" in migrate(tmp_path, "run.sh")[1]


@pytest.mark.parametrize(
    ("words", "key", "value", "said"),
    [
        ("--glu-activation swiglu", "ffn-hidden-size", 384, "ffn-hidden-size: 384  # Megatron's default"),  # BigScience: 4 x hidden
        ("--num-query-groups 2", "num-query-groups", None, "--num-query-groups 2: Megatron-LM reads it only with --group-query-attention"),
        ("--num-query-groups 2 --group-query-attention", "num-query-groups", 2, "num-query-groups: 2"),
        ("--zero-stage 0 --fp16", "zero-stage", 1, "zero-stage: 1  # 0 in the script, which does not run here with fp16"),
        ("--zero-stage 0 --bf16 --checkpoint-activations", "zero-stage", 1, "with bf16 and recomputation; results are the same"),
        ("--zero-stage 0 --bf16", "zero-stage", 0, "zero-stage: 0\n"),
        ("--reset-position-ids --eod-mask-loss", "eod-token-id", None, "# eod-token-id: ID  # fill in: token at the end"),
        ("--eval-iters -1", "eval-tokens", None, "--eval-iters -1: evaluations cannot be turned off"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 2", "lr-wsd-decay-style", "exponential", "exponential  # Megatron's default"),
    ],
)
def test_a_run_means_what_megatron_makes_of_its_flags(tmp_path, monkeypatch, words, key, value, said):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(f"{MODEL} {words}")
    values, text = migrate(tmp_path, "list.txt")
    assert values.get(key) == value and said in text


@pytest.mark.parametrize("name", ["muon", "dist_muon"])
def test_muon_gets_megatrons_defaults(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(f"{MODEL} --optimizer {name} --tensor-model-parallel-size 2 --lr 1e-3 --min-lr 1e-4 --decoupled-lr 2e-3")
    values, text = migrate(tmp_path, "list.txt")
    muon = {key: value for key, value in values.items() if key.startswith("muon")}
    assert muon == {
        "muon-momentum": 0.9,
        "muon-nesterov": False,
        "muon-extra-scale-factor": 1.0,
        "muon-coefficient-type": "quintic",
    }
    assert values["optimizer"] == "muon" and float(values["decoupled-lr"]) == 2e-3
    assert "#   --muon-tp-mode blockwise: Megatron's default, which" in text and "#   --decoupled-min-lr 1e-4" in text
    assert "Megatron's Muon steps them" in " ".join(capsys.readouterr().err.split())
    Path("list.txt").write_text(f"{MODEL} --optimizer {name} --muon-use-nesterov --muon-extra-scale-factor 0.2 --muon-tp-mode duplicated")
    values, text = migrate(tmp_path, "list.txt")
    assert (
        values["muon-nesterov"] is True
        and values["muon-extra-scale-factor"] == 0.2
        and "muon" not in text.partition("# Left out")[2].partition("# Without")[0]
    )
    Path("list.txt").write_text(
        f"{MODEL} --optimizer adam --muon-momentum 0.9 --muon-tp-mode blockwise --muon-no-split-qkv --tensor-model-parallel-size 2"
    )
    values, text = migrate(tmp_path, "list.txt")
    assert not any(key.startswith("muon") for key in values) and "muon" not in text.partition("# Left out")[2].partition("# Without")[0]


def test_deepspeeds_muon_becomes_flags_with_the_same_update(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(MODEL)
    section = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-4, "momentum": 0.9, "betas": [0.9, 0.98], "per_head_muon": True}}
    Path("ds.json").write_text(json.dumps({"optimizer": section}))
    values, text = migrate(tmp_path, "list.txt", "--deepspeed-config", "ds.json")
    assert values["lr"] == 3e-4 and values["muon-lr"] == 0.02 and values["weight-decay"] == 0.0 and values["adam-beta2"] == 0.98
    muon = {key: value for key, value in values.items() if key.startswith("muon") and key != "muon-lr"}
    assert muon == {
        "muon-momentum": 0.9,
        "muon-nesterov": True,
        "muon-scale-mode": "shape_scaling",
        "muon-extra-scale-factor": 1.0,
        "muon-coefficient-type": "simple",
    }
    assert "per_head_muon: query, key and value projections are orthogonalized as whole matrices" in text
    assert "clips what it has orthogonalized" in " ".join(capsys.readouterr().err.split())


def test_a_file_without_a_command_says_so(tmp_path):
    (tmp_path / "empty.sh").write_text("echo hello\n")
    with pytest.raises(ConfigError, match="no command that starts"):
        main([str(tmp_path / "empty.sh")])


def test_deepspeeds_json_is_divided():
    parts = divide(
        {
            "train_batch_size": 16,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100, "warmup_type": "linear"}},
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 2, "loss_scale": 0},
            "zero_optimization": {"stage": 2, "overlap_comm": True},
            "curriculum_learning": {"enabled": True},
            "wall_clock_breakdown": False,
            "prescale_gradients": False,
            "comms_logger": {"enabled": True},
        }
    )
    values = {option: value for option, (value, _) in parts.flags.items()}
    assert values == {
        "global-batch-size": "16",
        "lr": "0.0001",
        "adam-beta1": "0.9",
        "adam-beta2": "0.95",
        "adam-eps": "1e-08",
        "weight-decay": "0.1",
        "lr-decay-style": "linear",
        "lr-warmup-steps": "10",
        "clip-grad": "1.0",
        "fp16": "true",
        "initial-loss-scale": "65536",
        "zero-stage": "2",
    }
    assert {option: steps for option, (steps, _) in parts.steps.items()} == {"lr-decay-tokens": 100}
    assert parts.left == {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}
    assert [key for key, _ in parts.dropped] == ["curriculum_learning"] and [key for key, _ in parts.ignored] == ["wall_clock_breakdown"]


@pytest.mark.parametrize("power", [-1, 63, 10**9])
def test_a_loss_scale_out_of_range_stays_in_the_json(power):
    parts = divide({"fp16": {"enabled": True, "initial_scale_power": power}})
    assert set(parts.flags) == {"fp16"} and parts.left == {"fp16": {"initial_scale_power": power}}


def test_a_value_that_differs_in_the_json_is_said(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 16}))
    words = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --global-batch-size 8 --train-iters 5"
    main(["--deepspeed-config", str(tmp_path / "ds.json"), "--", *words.split()])
    assert "Note: --global-batch-size 8 is written, but DeepSpeed's JSON has train_batch_size = 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "remark"),
    [("--lr-warmup-init 0", None), ("--lr-warmup-fraction 0.1", "--lr-warmup-fraction 0.1 is written, and DeepSpeed's JSON")],
)
def test_the_json_s_warm_up_counts_where_no_flag_gives_one(tmp_path, monkeypatch, capsys, flag, remark):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(f"{MODEL} {flag}")
    Path("ds.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear"}}}))
    values, _ = migrate(tmp_path, "list.txt", "--deepspeed-config", "ds.json")
    assert values.get("lr-warmup-steps") == (3 if remark is None else None)
    assert remark is None or remark in capsys.readouterr().err


def test_steps_of_accumulation_that_would_change_the_batch_are_said(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}))
    words = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --train-iters 5"
    main(["--world-size", "2", "--deepspeed-config", str(tmp_path / "ds.json"), "--", *words.split()])
    said = capsys.readouterr().err
    assert "so it is 4, Megatron's micro-batch size x data-parallel ranks" in said and "add --global-batch-size 32" in said
    main(["--world-size", "2", "--deepspeed-config", str(tmp_path / "ds.json"), "--", *words.split(), "--global-batch-size", "32"])
    assert "gradient_accumulation_steps = 8" not in capsys.readouterr().err


def test_the_documents_example_is_what_the_tool_writes(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    script = re.search(r"```text\n(#!/bin/bash.*?)```", text, re.DOTALL)
    written = re.search(r"```yaml\n(# Made by.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("pretrain.sh").write_text(script.group(1))
    assert migrate(tmp_path, "pretrain.sh", "--deepspeed-output", "ds.json")[1] == written.group(1)
