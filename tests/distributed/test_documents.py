"""Runs with separated documents, in several layouts and across the switch, give the results of one process with a dense mask of T x T."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.gradients import float16_program
from tests.distributed.matrix import MODELS
from tests.distributed.runs import Run, start_program, train
from tests.ops.documents import dense_mask

PLAN = "--seq-length 48 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --num-layers 3 --lr 3e-3 --eval-interval 1"
PLAN += " --eod-token-id 63 --reset-attention-mask --reset-position-ids --eod-mask-loss"
LENGTHS = {"positions": "--train-tokens 11520", "tokens": "--train-tokens 5760 --sample constant-tokens"}


def dense_program(argv: list[str]) -> int:
    """Runs the program on one rank, with a mask of T x T for each micro-batch with documents."""
    from megatron_patch.model import attention

    masks = []

    def by_mask(queries, keys, values, documents, window=None):
        bounds = documents.bounds.long()
        ids = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff()).view(queries.shape[0], queries.shape[2])
        masks.append(dense_mask(ids, window))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=masks[-1], enable_gqa=True)

    attention.documents_attention = by_mask  # type: ignore[assignment]
    code = start_program(argv)
    assert masks
    return code


def dense_runs(tmp_path_factory: pytest.TempPathFactory, corpus: str, plan: str) -> Callable[[str], Run]:
    """Returns a function of further words that returns the run of one process with dense masks; each is trained at its first use."""

    @functools.cache
    def run(words: str) -> Run:
        folder = tmp_path_factory.mktemp("dense") / "run"
        return train(folder, 1, plan, words, "--zero-stage 0 --data-path", corpus, main=dense_program)

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    return dense_runs(tmp_path_factory, corpus, PLAN)


def differences(run: Run, single: Run) -> dict[str, float]:
    """Returns the largest relative differences of losses, gradient norms and held-out losses."""
    found = {
        "loss": zip(run.losses, single.losses, strict=True),
        "grad_norm": zip(run.values("grad_norm"), single.values("grad_norm"), strict=True),
    }
    for key in ("token_loss", "patch_loss"):
        held_out = zip(run.records("evaluation"), single.records("evaluation"), strict=True)
        found[key] = ((ours[key], theirs[key]) for ours, theirs in held_out)
    return {key: max(abs(value - expected) / abs(expected) for value, expected in pairs) for key, pairs in found.items()}


@pytest.mark.parametrize(
    ("ranks", "layout", "length", "model"),
    [
        (2, "--zero-stage 3 --recompute-granularity full --replay-interval 5", "tokens", "llama"),
        pytest.param(2, "--zero-stage 2", "positions", "gpt2", marks=pytest.mark.slow),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective", "tokens", "llama"),
        pytest.param(2, "--pipeline-model-parallel-size 2", "tokens", "llama", marks=pytest.mark.slow),
        (2, "--pipeline-model-parallel-size 2 --zero-stage 0", "positions", "gpt2"),
    ],
)
def test_a_layout_equals_one_process_with_a_dense_mask(tmp_path, corpus, dense, ranks, layout, length, model):
    words = f"{MODELS[model]} {LENGTHS[length]}"
    run = train(tmp_path / "run", ranks, PLAN, words, layout, "--data-path", corpus)
    assert len({record["patch_size"] for record in run.records("step")}) == 2 and len(run.records("evaluation")) >= 10
    found = differences(run, dense(words))
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_documents_pass_through_deepspeed_in_float16(tmp_path, corpus, dense, zero):
    """DeepSpeed casts the arguments of its engine; bounds are whole numbers, and stay so."""
    words = f"--fp16 --loss-scale 1024 --zero-stage {zero}"
    run = train(tmp_path / "run", 2, PLAN, LENGTHS["tokens"], words, "--data-path", corpus, main=float16_program)
    single = dense(f"{MODELS['llama']} {LENGTHS['tokens']}")
    assert run.losses == pytest.approx(single.losses, rel=1e-2) and run.losses != pytest.approx(single.losses, rel=1e-6)
