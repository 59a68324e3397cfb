"""The held-out loss of a blend: each corpus' own loss, and their sum by weight, as a plain computation over the raw tokens gives them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_patch.cli import evaluate
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.engine.inference import load_model
from megatron_patch.reporting.plotting import read_curve
from tests.distributed.runs import make_corpus, printed, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --train-tokens 1152 --lr 3e-2 --eval-tokens 3000"
STAGES = json.dumps([{"name": "token", "patch_size": 1, "steps": 2}, {"name": "patch", "patch_size": 3, "steps": 2}])
UNIT, LOOKAHEAD = 48, 64


def noise(prefix, tokens):
    """Writes one document of random tokens, whose loss is higher than that of the walks, and returns its prefix."""
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.append(np.random.default_rng(1).integers(0, 60, tokens).astype(np.uint16), np.array([tokens]))
        writer.finish()
    return str(prefix)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two held-out corpora, the first with fewer tokens than its half of --eval-tokens, and runs that weigh them differently."""
    folder = tmp_path_factory.mktemp("blend")
    corpora = [noise(folder / "short" / "valid", 1000), make_corpus(folder / "long" / "valid", documents=90, seed=2)]
    corpus = make_corpus(folder / "train")

    def run(name, *weights):
        words = [word for pair in zip(weights, corpora, strict=True) for word in pair] if weights else corpora
        return train(folder / name, 1, PLAN, ["--stages", STAGES], ["--data-path", corpus, "--valid-data-path", *words])

    return {"corpora": corpora, "0.95": run("a", "0.95", "0.05"), "0.05": run("b", "0.05", "0.95"), "none": run("c")}


def losses_by_hand(run, corpus, k):
    """Returns the sum of the losses over the tokens that an evaluation reads, and their number."""
    model = load_model(str(run.folder)).model.double()
    tokens = torch.from_numpy(TokenCorpus([corpus]).read(0, TokenCorpus([corpus]).num_tokens))
    available = (len(tokens) - LOOKAHEAD) // UNIT
    count = min(available, 3000 // 2 // UNIT)
    total = 0.0
    with torch.no_grad():
        for number in range(count):
            first = number * available // count * UNIT
            for start in range(first, first + UNIT, 16 * k):
                x = tokens[start : start + 17 * k].view(17, k)
                log_p = F.log_softmax(model.logits(x[None, :16])[0], dim=-1)
                total -= float(log_p.gather(1, x[1:]).sum())
    return total, count * UNIT


@pytest.mark.parametrize("k", [1, 3])
def test_each_corpus_and_the_weighted_sum_are_those_of_a_plain_computation(runs, k):
    key = "token_loss" if k == 1 else "patch_loss"
    by_hand = [losses_by_hand(runs["none"], corpus, k) for corpus in runs["corpora"]]
    assert by_hand[0][1] < by_hand[1][1], "the first corpus is shorter than its part of --eval-tokens"
    means = [total / count for total, count in by_hand]
    assert abs(means[0] - means[1]) > 0.01
    expected = {
        "0.95": 0.95 * means[0] + 0.05 * means[1],
        "0.05": 0.05 * means[0] + 0.95 * means[1],
        "none": sum(total for total, _ in by_hand) / sum(count for _, count in by_hand),
    }
    for name, value in expected.items():
        record = runs[name].records("evaluation")[-1]
        assert record[key] == pytest.approx(value, rel=1e-6), name
        assert [part[key] for part in record["corpora"].values()] == pytest.approx(means, rel=1e-6)
        assert [part["eval_tokens"] for part in record["corpora"].values()] == [count for _, count in by_hand]
        assert record[key] == pytest.approx(sum(part["weight"] * part[key] for part in record["corpora"].values()), rel=1e-12)


def test_weights_change_only_the_sum(runs):
    one, other = (runs[name].records("evaluation") for name in ("0.95", "0.05"))
    assert len(one) == 2 and list(one[0]["corpora"]) == ["short/valid", "long/valid"]
    for ours, theirs in zip(one, other, strict=True):
        for name, part in ours["corpora"].items():
            assert {**part, "weight": None} == {**theirs["corpora"][name], "weight": None}
    assert runs["0.95"].losses == runs["0.05"].losses == runs["none"].losses
    for name, text in (("0.95", "0.95 × short/valid + 0.05 × long/valid"), ("none", "each evaluated token of short/valid, long/valid")):
        assert text in printed(runs[name].folder)
    assert "long/valid    5.0%  token loss" in printed(runs["0.95"].folder)


def test_a_corpus_keeps_its_name_when_another_joins_or_leaves(runs, tmp_path, monkeypatch):
    """Two more starts: with a corpus whose path ends as that of the first, and then with that first corpus alone."""
    monkeypatch.chdir(tmp_path)
    first, other = runs["corpora"]
    data = ["--data-path", make_corpus(tmp_path / "train")]

    def start(interval, *words):
        options = ["--stages", STAGES, "--eval-interval", "1", "--exit-interval", interval, "--valid-data-path", *words]
        return train(tmp_path / "run", 1, PLAN, data, options)

    start("1", "0.5", first, "0.5", data[1])
    start("2", "0.4", os.path.relpath(first), "0.4", data[1], "0.2", other)
    run = start("4", first)
    evaluations = run.records("evaluation")
    assert [list(record["corpora"]) for record in evaluations] == [["valid", "train"], ["valid", "train", "long/valid"], *[["valid"]] * 2]
    assert evaluations[-1]["corpora"]["valid"]["token_loss"] == evaluations[-1]["token_loss"]
    curve = read_curve(run.folder, corpus="valid")
    assert len(curve.losses) == 4 and curve.notes == []
    assert read_curve(run.folder, corpus="train").notes == ["draws no evaluation without train: from step 3 to 4"]


def test_the_tool_weighs_corpora_in_the_same_way(runs, capsys):
    def result(*words):
        evaluate.main(["--load", str(runs["none"].folder), "--data-path", *words])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    single = [result(corpus) for corpus in runs["corpora"]]
    blend = result("3", runs["corpora"][0], "1", runs["corpora"][1])
    plain = result(*runs["corpora"])
    for result in (blend, plain):
        for part, alone, corpus in zip(result["corpora"].values(), single, runs["corpora"], strict=True):
            assert part["data_path"] == corpus
            assert all(part[name] == alone[name] for name in ("token_loss", "loss", "perplexity", "tokens"))
        assert result["tokens"] == sum(alone["tokens"] for alone in single)
    assert list(blend["corpora"]) == ["short/valid", "long/valid"] and "corpora" not in single[0]
    assert blend["loss"] == blend["token_loss"] == pytest.approx(0.75 * single[0]["loss"] + 0.25 * single[1]["loss"], rel=1e-12)
    assert plain["loss"] == pytest.approx(sum(one["loss"] * one["tokens"] for one in single) / plain["tokens"], rel=1e-12)
