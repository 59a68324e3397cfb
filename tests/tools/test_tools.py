"""The command-line tools as users call them, on a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.engine.inference import load_model
from tests.distributed.runs import ROOT, make_corpus, train
from tests.programs import run_program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    corpus = make_corpus(folder / "walks")
    plan = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 4200 --lr 3e-3 --eval-interval 4"
    return train(folder / "run", 2, plan, "--zero-stage 3 --data-path", corpus), corpus


def tool(name, *words, code=0, text=None):
    result = run_program(f"tools/{name}.py", *words, cwd=ROOT, text=text)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize("k", [1, 3])
def test_evaluate_is_the_mean_over_all_tokens(run, k):
    trained, corpus = run
    result = json.loads(tool("evaluate", "--load", trained.folder, "--data-path", corpus, "--patch-size", k).splitlines()[-1])
    model = load_model(str(trained.folder)).model.double()
    tokens = torch.from_numpy(TokenCorpus([corpus]).read(0, TokenCorpus([corpus]).num_tokens))
    samples = (len(tokens) - k) // (16 * k)
    total = 0.0
    with torch.no_grad():
        for number in range(samples):
            x = tokens[number * 16 * k :][: 17 * k].view(17, k)
            log_p = F.log_softmax(model.logits(x[None, :16])[0], dim=-1)
            total -= float(log_p.gather(1, x[1:]).sum())
    assert result["tokens"] == samples * 16 * k
    assert result["loss"] == pytest.approx(total / result["tokens"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert ("token_loss" in result) == (k == 1) and ("patch_loss" in result) == (k > 1)


def test_evaluate_reads_no_label_after_the_data(run):
    """With patches longer than the rest after the last block, the last sample is the last one that fits with its labels."""
    trained, corpus = run
    tokens = TokenCorpus([corpus]).num_tokens
    k = next(k for k in range(65, 400) if (tokens - 64) // k * k + k > tokens)
    result = json.loads(tool("evaluate", "--load", trained.folder, "--data-path", corpus, "--seq-length", 1, "--patch-size", k))
    assert result["tokens"] == (tokens - k) // k * k


def test_generate_continues_a_prompt(run):
    trained, _ = run
    words = (
        "--load",
        trained.folder,
        "--prompt",
        "1 2 3",
        "--tokenizer-type",
        "NullTokenizer",
        "--tokenizer-model",
        "64",
        "--temperature",
        "0",
    )
    result = json.loads(tool("generate", *words, "--max-new-tokens", "6", "--json"))
    assert result["tokens"] <= 6 and all(0 <= int(word) < 64 for word in result["text"].split())
    assert "names no tokenizer" in tool("generate", "--load", trained.folder, code=2)
    assert "--interactive and --prompt" in tool("generate", *words, "--interactive", code=2)


def test_interactive_mode_treats_each_line_as_a_separate_prompt(run):
    trained, _ = run
    words = ("--load", trained.folder, "--tokenizer-type", "NullTokenizer", "--tokenizer-model", "64", "--temperature", "0")
    lines = [json.loads(tool("generate", *words, "--prompt", p, "--max-new-tokens", "6", "--json"))["text"] for p in ("1 2 3", "40 41")]
    assert tool("generate", *words, "--max-new-tokens", "6", "--interactive", text="1 2 3\n40 41\n").splitlines() == lines


def test_plot_draws_runs(run, tmp_path):
    trained, _ = run
    tool("plot", trained.folder, trained.folder, "--labels", "one", "two", "--output", tmp_path / "sub" / "loss.png")
    assert (tmp_path / "sub" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "2 runs" in tool("plot", trained.folder, trained.folder, "--labels", "one", code=3)
    assert "metrics.jsonl" in tool("plot", tmp_path, code=3)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    assert "contains no evaluation" in tool("plot", tmp_path, code=3)


def test_inspect_shows_and_checks(run, tmp_path):
    _, corpus = run
    result = json.loads(tool("inspect_dataset", corpus, "--check", "--patch-size", "3").splitlines()[-1])
    assert result["problems"] == [] and result["documents"] == 300 and result["patches"] == result["tokens"] // 3
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(Path(corpus + suffix).read_bytes())
    index = bytearray((tmp_path / "d.idx").read_bytes())
    index[34:38] = np.int32(1).tobytes()
    (tmp_path / "d.idx").write_bytes(index)
    assert "is damaged" in tool("inspect_dataset", tmp_path / "d", "--check", code=3)


def test_inspect_shows_where_datasets_differ(run, tmp_path):
    _, corpus = run
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(Path(corpus + suffix).read_bytes())
    assert json.loads(tool("inspect_dataset", corpus, "--diff", tmp_path / "d").splitlines()[-1])["diff"]["equal"]
    tokens = np.fromfile(tmp_path / "d.bin", np.uint16)
    tokens[[3, 5000]] ^= 1
    tokens.tofile(tmp_path / "d.bin")
    assert "2 of 300 sequences differ; the first is number 0, from its token 3 on" in tool(
        "inspect_dataset", corpus, "--diff", tmp_path / "d", code=3
    )


def test_inspect_shows_how_stages_divide(run, tmp_path):
    _, corpus = run
    (tmp_path / "c.yaml").write_text(
        "num-layers: 1\nhidden-size: 8\nnum-attention-heads: 1\nffn-hidden-size: 8\nvocab-size: 64\nseq-length: 16\n"
        "micro-batch-size: 2\nglobal-batch-size: 12\npatch-size: 3\npatch-fraction: 0.5\ntrain-tokens: 9000\nsplit: 80,20,0\n"
    )
    division = json.loads(tool("inspect_dataset", corpus, "--config", tmp_path / "c.yaml").splitlines()[-1])["division"]
    total = TokenCorpus([corpus]).num_tokens
    assert division["training_tokens"] + division["validation_tokens"] == total
    assert division["blocks"] * division["block_tokens"] + division["unread_tokens"] == division["training_tokens"]
    patch, token = division["stages"]
    assert (patch["patch_size"], token["patch_size"]) == (3, 1)
    for stage in (patch, token):
        assert stage["tokens"] == stage["samples"] * 16 * stage["patch_size"] == pytest.approx(4500, rel=0.2)
        assert stage["share"] == pytest.approx(stage["tokens"] / (division["blocks"] * division["block_tokens"]), abs=1e-6)
    assert token["epochs"] == pytest.approx(patch["share"] + token["share"], abs=0.03)


@pytest.mark.parametrize(
    ("name", "words", "code", "text"),
    [
        ("evaluate", ["--load", "{run}", "--data-path", "nowhere"], 3, "does not exist"),
        ("evaluate", ["--load", "nowhere", "--data-path", "{corpus}"], 4, "contains no checkpoint"),
        ("evaluate", ["--load", "{run}", "--data-path", "{corpus}", "--seq-length", "100000"], 3, "one sample needs 100,001"),
        ("evaluate", ["--load", "{run}", "--data-path", "{corpus}", "--patchsize", "2"], 2, "--patch-size"),
        ("evaluate", ["--load", "{run}", "--data-path", "{corpus}", "--seq-length", "0"], 2, "whole numbers from 1"),
        ("evaluate", ["--load", "{run}", "--data-path", "{corpus}", "--micro-batch-size", "2X"], 2, "'2X' is not a count"),
        ("generate", ["--load", "{run}", "--max-new-tokens", "0"], 2, "whole numbers from 1"),
        ("inspect_dataset", ["nowhere"], 3, "does not exist"),
    ],
)
def test_wrong_arguments_end_with_what_to_do(run, name, words, code, text):
    trained, corpus = run
    assert text in tool(name, *(word.format(run=trained.folder, corpus=corpus) for word in words), code=code)
