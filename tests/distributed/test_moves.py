"""A checkpoint written under any layout resumes under any other, with the same data and the same losses."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch

from megatron_patch.engine.inference import load_model
from tests.distributed.runs import Run, ledger, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --lr-warmup-fraction 0.2"
PLAN += " --num-layers 3 --no-untie-embeddings-and-output-weights --eval-interval 5"
SWITCH = 16
LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1"),
    "PP2": (2, "--pipeline-model-parallel-size 2 --zero-stage 1"),
    "DP2 ZeRO-1": (2, "--zero-stage 1"),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --zero-stage 1"),
    "ZeRO-3": (2, "--zero-stage 3"),
    "CP2": (2, "--context-parallel-size 2 --zero-stage 2"),
    "CP4 ZeRO-3": (4, "--context-parallel-size 4 --zero-stage 3"),
    "TP2 CP2": (4, "--tensor-model-parallel-size 2 --context-parallel-size 2 --zero-stage 1"),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus) -> Run:
    run = train(tmp_path_factory.mktemp("unbroken") / "run", 1, PLAN, "--zero-stage 0 --log-token-spans --data-path", corpus)
    assert run.records("switch")[0]["step"] == SWITCH
    return run


def resume(folder, corpus, layout, stop=None):
    ranks, words = LAYOUTS[layout]
    return train(folder, ranks, PLAN, words, f"--exit-interval {stop}" if stop else "", "--data-path", corpus)


def check(run, unbroken):
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(unbroken.values("grad_norm"), rel=1e-4)
    assert run.values("tokens") == unbroken.values("tokens")
    found = [(record["step"], record["token_loss"]) for record in run.records("evaluation")]
    assert [step for step, _ in found] == [record["step"] for record in unbroken.records("evaluation")]
    assert [loss for _, loss in found] == pytest.approx([record["token_loss"] for record in unbroken.records("evaluation")], rel=1e-5)


def test_from_layout_to_layout_through_the_switch(tmp_path, corpus, unbroken):
    """One run that changes its layout before, directly at and directly after the switch, through all layouts."""
    corpus = [corpus, "--log-token-spans"]
    for stop, layout in ((4, "PP2"), (SWITCH - 1, "TP2"), (SWITCH, "TP2 PP2"), (SWITCH + 1, "ZeRO-3"), (SWITCH + 4, "PP2")):
        resume(tmp_path / "run", corpus, layout, stop)
    run = resume(tmp_path / "run", corpus, "DP2 ZeRO-1")
    check(run, unbroken)
    assert np.array_equal(ledger(run, corpus[0]), ledger(unbroken, corpus[0])), "each token is read as often as without a change of layout"


def test_a_checkpoint_of_tensor_and_pipeline_ranks_is_one_model(tmp_path, corpus, unbroken):
    """Evaluation, generation and export load the checkpoint as one full model."""
    run = resume(tmp_path / "run", corpus, "TP2 PP2")
    expected = load_model(str(unbroken.folder)).model.state_dict()
    found = load_model(str(run.folder)).model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_pipeline_resumed_on_the_same_layout_is_bit_identical(tmp_path, corpus, stop):
    words = ("--sample constant-tokens", "--pipeline-model-parallel-size 3 --zero-stage 1 --data-path", corpus)
    whole = train(tmp_path / "whole", 3, PLAN, *words)
    train(tmp_path / "run", 3, PLAN, f"--exit-interval {stop}", *words)
    resumed = train(tmp_path / "run", 3, PLAN, *words)
    assert resumed.losses == whole.losses and resumed.values("grad_norm") == whole.values("grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_every_layout_to_every_layout(tmp_path, corpus, unbroken, stop):
    for layout in LAYOUTS:
        resume(tmp_path / layout, corpus, layout, stop)
    for before, after in itertools.product(LAYOUTS, LAYOUTS):
        folder = tmp_path / f"{before} to {after}"
        shutil.copytree(tmp_path / before, folder)
        check(resume(folder, corpus, after), unbroken)


def test_another_padding_of_the_vocabulary(tmp_path, corpus, unbroken):
    """Three tensor-parallel ranks pad the vocabulary to another size: rows of padding are added and removed."""
    words = "--tensor-model-parallel-size 3 --num-attention-heads 3 --num-query-groups 3 --hidden-size 24 --ffn-hidden-size 48"
    words += " --make-vocab-size-divisible-by 5"
    whole = train(tmp_path / "whole", 1, PLAN, words, "--tensor-model-parallel-size 1 --zero-stage 0 --data-path", corpus)
    train(tmp_path / "run", 3, PLAN, words, "--exit-interval 6 --data-path", corpus)
    train(tmp_path / "run", 1, PLAN, words, "--tensor-model-parallel-size 1 --exit-interval 12 --data-path", corpus)
    moved = train(tmp_path / "run", 3, PLAN, words, "--data-path", corpus)
    assert moved.losses == pytest.approx(whole.losses, rel=1e-5)
