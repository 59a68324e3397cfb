"""Samples during training equal those of the checkpoint of the same step, on every layout, and do not change training."""

from __future__ import annotations

import json

import pytest

from megatron_patch.engine.inference import load_model
from megatron_patch.model.generate import generate
from tests.distributed.runs import make_corpus, printed, train

PLAN = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --patch-fraction 0.5 --train-tokens 2304 --lr 3e-3 "
    "--eval-interval 2 --save-interval 2 --keep-last 0"
)
SAMPLES = [
    "--sample-prompts",
    "1 2 3",
    "40 41 42 43 44",
    "",
    "--sample-tokens",
    "12",
    "--tokenizer-type",
    "NullTokenizer",
    "--tokenizer-model",
    "64",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("samples") / "walks")


@pytest.mark.parametrize(
    "layout",
    [
        "--zero-stage 3",
        "--zero-stage 1 --bf16",
        "--zero-stage 0 --bf16",
        "--pipeline-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_samples_are_the_checkpoint_s_greedy_text_and_do_not_change_training(layout, corpus, tmp_path):
    plain = train(tmp_path / "plain", 2, PLAN, layout, "--data-path", corpus)
    run = train(tmp_path / "run", 2, PLAN, layout, SAMPLES, "--data-path", corpus)
    assert run.losses == plain.losses
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in run.records("evaluation")]
    assert [line["step"] for line in lines] == [step for step in steps for _ in range(3)] and len(steps) > 2
    assert "sample: 1 2 3" in printed(run.folder)
    if "bf16" in layout:
        return
    for step in steps:
        model = load_model(str(run.folder / f"step-{step:08d}")).model
        expected = generate(model, [[1, 2, 3], [40, 41, 42, 43, 44], [63]], 12, eod_id=63)
        for ids, line in zip(expected, [line for line in lines if line["step"] == step], strict=True):
            assert line["new_tokens"] == len(ids)
            assert line["text"].split() == [str(token) for token in (ids[:-1] if ids[-1] == 63 else ids)]


def test_a_resumed_run_has_each_sample_once(corpus, tmp_path):
    train(tmp_path / "run", 1, PLAN, SAMPLES, "--data-path", corpus, "--exit-interval", "3")
    run = train(tmp_path / "run", 1, PLAN, SAMPLES, "--data-path", corpus)
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[::3]] == [record["step"] for record in run.records("evaluation")]


def test_samples_that_cannot_be_written_are_refused_before_the_first_step(corpus, tmp_path):
    train(tmp_path / "run", 1, PLAN, ["--sample-prompts", "a"], "--data-path", corpus, expect=2)
    assert "names no tokenizer" in printed(tmp_path / "run")
    train(
        tmp_path / "long", 1, PLAN, SAMPLES, "--model-family gpt2 --ffn-hidden-size 64 --num-query-groups 4 --data-path", corpus, expect=2
    )
    assert "learned positions" in printed(tmp_path / "long") and not (tmp_path / "long" / "metrics.jsonl").exists()
