"""Whole runs against the independent trainer: every step's loss, learning rate, gradient norm, tokens and cost.

The initial weights are made by transformers and imported with `from-hf`; the independent trainer starts from the model that was saved, not
from what was imported. It reads the same tokens: the spans are the run's own log, the tokens are read from the `.bin` file by numpy. The
numbers of steps, samples and tokens of each stage below are worked out by hand from the flags.

Both sides compute in float32, whose rounding is 6e-8, and sum in another order. The tolerance of losses, 1e-6, is a few roundings; the
largest difference that was seen is 1.8e-7. Norms of gradients are differences of larger numbers, and Adam's first steps raise the rounding
of small gradients into the weights: seen are 3.5e-7, with ZeRO 3 4.1e-6, so the tolerance is 1e-5. The rest is arithmetic in float64.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.convert.flags import training_flags
from megatron_patch.convert.from_hugging_face import from_hugging_face
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, command, make_corpus, printed, start_program
from tests.oracle import independent_trainer
from tests.oracle.independent_trainer import Muon, OracleStage, cosine, train, warmup_stable_decay

transformers = pytest.importorskip("transformers")

T, LR, MIN_LR = 16, 3e-3, 3e-4
COMMON = f"--seq-length {T} --global-batch-size 12 --lr {LR} --min-lr {MIN_LR} --split 90,10,0 --seed 7 --shuffle-window-blocks 16 --num-workers 1"
COMMON += " --eval-tokens 64 --log-token-spans --finetune"


def power(number):
    return [1 / (k + 1) for k in range(4)]


def annealed(number):
    """Over the last 4 of 8 steps, the weights move from both labels to the first: 1 to 2, and 1 to 0."""
    moved = max(0.0, (number - 3) / 4)
    return [1 + moved, 1 - moved]


PATCH_TRAIN = [
    # 192 tokens a step; two thirds of 4,608 tokens are 16 steps of 3 samples. Both schedules warm up over a quarter.
    OracleStage(4, T, 3, 16, lambda n: cosine(n, 768, 3072, LR, MIN_LR)),
    OracleStage(1, T, 12, 8, lambda n: cosine(n - 3072, 384, 1536, LR, MIN_LR)),
]


def superposed(n):
    """One schedule over 8,064 tokens; the last quarter of 24 steps decays."""
    return warmup_stable_decay(n, 1008, 8064, 6 * 192, LR, MIN_LR)


def rewarmed(n):
    """One cosine over 24 steps of 192 tokens, with a second warm-up of 3 steps at the start of the last stage."""
    return cosine(n, 384, 4608, LR, MIN_LR) * min(1.0, (n - 3072) / 576 if n > 3072 else 1.0)


STAGES = (
    '[{"patch_size":4,"steps":8,"position_weights":"power"},'
    '{"patch_size":2,"steps":8,"lr_policy":"continue","anneal_share":0.5},'
    '{"patch_size":1,"lr_policy":"rewarm","lr_warmup_tokens":576,"optimizer":"reset_moments"}]'
)
TOLERANCES = {"loss": 1e-6, "grad_norm": 1e-5, "lr": 1e-12, "tokens": 0, "cost": 1e-12}
# name: (model, ranks, flags, stages)
CASES = {
    "patch-train": (
        "llama", 1, "--recipe patch-train --patch-size 4 --train-tokens 4608 --lr-warmup-fraction 0.25 --micro-batch-size 3",
        PATCH_TRAIN,
    ),
    "token-superposition": (
        "llama", 2,
        "--recipe token-superposition --patch-size 4 --patch-compute-share 0.25 --train-tokens 8064 --lr-warmup-fraction 0.125"
        " --lr-wsd-decay-fraction 0.25 --micro-batch-size 2 --zero-stage 1",
        # A quarter of 24 steps of 192 positions.
        [OracleStage(4, T, 12, 6, superposed), OracleStage(1, T, 12, 18, superposed, "keep")],
    ),
    "a list of stages": (
        "llama", 2, f"--stages {STAGES} --train-tokens 4608 --lr-warmup-tokens 384 --micro-batch-size 1 --zero-stage 2",
        [
            OracleStage(4, T, 3, 8, rewarmed, "new", power),
            OracleStage(2, T, 6, 8, rewarmed, "keep", annealed),
            OracleStage(1, T, 12, 8, rewarmed, "zero moments"),
        ],
    ),
    "constant tokens": (
        "llama", 2, "--sample constant-tokens --patch-size 4 --patch-fraction 0.5 --train-tokens 4608 --micro-batch-size 3 --zero-stage 1",
        [
            # Samples of 16 tokens in both stages: 4 positions, then 16.
            OracleStage(4, 4, 12, 12, lambda n: cosine(n, 0, 2304, LR, MIN_LR)),
            OracleStage(1, T, 12, 12, lambda n: cosine(n - 2304, 0, 2304, LR, MIN_LR)),
        ],
    ),
    "tied GPT-2, pipeline": (
        "gpt2", 2, "--recipe patch-train --patch-size 4 --train-tokens 4608 --lr-warmup-fraction 0.25 --micro-batch-size 1"
        " --pipeline-model-parallel-size 2 --zero-stage 1",
        PATCH_TRAIN,
    ),
    "indivisible batch": (
        "llama", 2, "--global-batch-size 10 --patch-size 2 --patch-fraction 0.5 --train-tokens 3840 --micro-batch-size 3 --zero-stage 3",
        [
            # 5 samples, then 10, for two ranks with micro-batches of 3: one sample of the first stage's step is padding, two of the second's.
            OracleStage(2, T, 5, 12, lambda n: cosine(n, 0, 1920, LR, MIN_LR)),
            OracleStage(1, T, 10, 12, lambda n: cosine(n - 1920, 0, 1920, LR, MIN_LR)),
        ],
    ),
}  # fmt: skip

POLAR_EXPRESS = [
    # Table of arXiv 2505.16932 (Algorithm 1), as published; the last polynomial is that of all further steps.
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]  # fmt: skip
# Its code divides the argument of all polynomials but the last by 1.01.
POLAR_EXPRESS = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS] + [(1.875, -1.25, 0.375)]
# name: (one of CASES, further flags, Muon)
MUON_CASES = {
    "reset": ("patch-train", "", Muon()),
    "keep, own rates and decays": (
        "token-superposition", "--zero-stage 3 --muon-lr 6e-3 --muon-weight-decay 0.3 --decoupled-lr 1e-3 --embedding-weight-decay 0",
        Muon(lr=2.0, decay=0.3, vocabulary_lr=1 / 3, vocabulary_decay=0.0),
    ),
    "reset_moments, no Nesterov, shape_scaling": (
        "a list of stages", "--no-muon-nesterov --muon-momentum 0.9 --muon-scale-mode shape_scaling --muon-extra-scale-factor 1",
        Muon(momentum=0.9, nesterov=False, scale=lambda rows, columns: math.sqrt(max(1, rows / columns))),
    ),
    "tied GPT-2, polar_express, unit_rms_norm": (
        "tied GPT-2, pipeline", "--muon-coefficient-type polar_express --muon-num-ns-steps 9 --muon-scale-mode unit_rms_norm",
        Muon(coefficients=[*POLAR_EXPRESS, POLAR_EXPRESS[-1]], scale=lambda rows, columns: 0.2 * math.sqrt(rows / columns)),
    ),
}  # fmt: skip
MUON_TOLERANCES = {**TOLERANCES, "loss": 1e-6, "grad_norm": 1e-5}


def make_model(kind: str) -> torch.nn.Module:
    """Returns a small model of transformers with random weights, also for biases and norms."""
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=T, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=T, bos_token_id=None, eos_token_id=63,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "walks")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each kind: (folder as transformers saved it, the import, the flags that train it)."""
    found = {}
    for kind in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(kind)
        make_model(kind).save_pretrained(str(folder / "public"))
        result = from_hugging_face(folder / "public", folder / "imported")
        found[kind] = (folder / "public", folder / "imported", training_flags(result.shape, result.family))
    return found


def spans_by_step(folder: Path) -> list[list[tuple[int, int]]]:
    """Returns the spans that all ranks read in each step, from the run's log."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for path in sorted((folder / "spans").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found = [(first, length) for _, first, length in itertools.chain(*line["spans"])]
            steps.setdefault(line["step"], []).extend(found)
    return [steps[number] for number in range(1, len(steps) + 1)]


def check(tmp_path, corpus, models, case, more="", muon=None):
    """Trains a case of `CASES` with further flags and compares each step with the independent trainer's."""
    kind, ranks, words, stages = CASES[case]
    words = f"{words} {more}"
    public, imported, flags = models[kind]
    argv = command(flags, COMMON, words, ["--data-path", corpus, "--load", str(imported), "--save", str(tmp_path / "run")])
    assert run_ranks(start_program, ranks, tmp_path / "run-logs", argv) == [0] * ranks, printed(tmp_path / "run")
    steps = Run(tmp_path / "run").records("step")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(public), dtype=torch.float32)
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16)
    expected = list(train(model, tokens, spans_by_step(tmp_path / "run"), stages, T, muon))
    assert len(steps) == len(expected) == sum(stage.steps for stage in stages)
    for name, tolerance in (MUON_TOLERANCES if muon else TOLERANCES).items():
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in expected], rel=tolerance), name


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_independent_trainer(tmp_path, corpus, models, case):
    check(tmp_path, corpus, models, case)


@pytest.mark.parametrize("case", MUON_CASES)
def test_every_step_of_muon_is_that_of_the_independent_trainer(tmp_path, corpus, models, case):
    of_adamw, words, muon = MUON_CASES[case]
    check(tmp_path, corpus, models, of_adamw, f"--optimizer muon {words}", muon)


def test_the_independent_trainer_imports_nothing_of_this_package():
    tree = ast.parse(Path(independent_trainer.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"__future__", "collections", "dataclasses", "math", "numpy", "torch"}
