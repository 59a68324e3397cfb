"""Compiled blocks give the results of eager ones under tensor and pipeline parallelism; at a switch each length is compiled once."""

from __future__ import annotations

import os

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 1536 --lr 3e-3 --num-layers 3"
PLAN += " --sample constant-tokens --eval-interval 2"


def _graphs(argv):
    """Trains with the tracing part of the compiler, which other tests disable; returns the number of graphs and the graph breaks."""
    os.environ.pop("TORCHDYNAMO_DISABLE")
    import torch

    torch._dynamo.config.disable = False
    from torch._dynamo.utils import counters

    from megatron_patch.training import build_engine as build
    from megatron_patch.training.pretrain import main

    interruptible = build.interruptible
    build.interruptible = lambda stopping: interruptible(stopping, "aot_eager")
    assert main(argv) == 0
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --bf16",
        pytest.param("--tensor-model-parallel-size 2 --num-query-groups 1 --zero-stage 2", marks=pytest.mark.slow),
        pytest.param("--pipeline-model-parallel-size 2 --recompute-granularity full", marks=pytest.mark.slow),
        pytest.param("--bf16 --zero-stage 0 --recompute-granularity selective", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_of_sharded_layers(tmp_path, corpus, layout):
    plain = train(tmp_path / "plain", 2, PLAN, layout, "--data-path", corpus)
    argv = command(MODEL, DATA, PLAN, layout, "--compile --data-path", corpus, ["--save", str(tmp_path / "run")])
    found = run_ranks(_graphs, 2, tmp_path / "run-logs", argv)
    assert Run(tmp_path / "run").losses == pytest.approx(plain.losses, rel=1e-6 if "bf16" not in layout else 1e-3)
    assert found == [(4, {})] * 2, "one unbroken graph for each of two lengths, in training and in evaluation"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--zero-stage 2", "--tensor-model-parallel-size 2 --recompute-granularity full"])
def test_documents_are_compiled_once_for_all_their_numbers(tmp_path, corpus, layout):
    """For each length and mode one graph with documents, and one where each sample of a micro-batch is a single document."""
    layout = f"{layout} --reset-attention-mask --eod-token-id 63"
    plain = train(tmp_path / "plain", 2, PLAN, layout, "--data-path", corpus)
    argv = command(MODEL, DATA, PLAN, layout, "--compile --data-path", corpus, ["--save", str(tmp_path / "run")])
    found = run_ranks(_graphs, 2, tmp_path / "run-logs", argv)
    assert Run(tmp_path / "run").losses == pytest.approx(plain.losses, rel=1e-6)
    assert found == [(8, {})] * 2, "of two lengths, in training and in evaluation"
