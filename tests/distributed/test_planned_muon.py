"""What a plan counts for Muon, against real engines: the bytes of optimizer states, and the bytes that each rank sends in a step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_patch.config.resolve import load_config
from megatron_patch.planning.hidden_matrices import matrix_step
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import pipeline_parts
from megatron_patch.training.pretrain import make_engine_config
from tests.distributed.runs import DATA, MODEL, command, start_program, train

STEPS = 3


def measure(argv):
    """Runs the program on a rank and writes the bytes of its optimizer states and those that it sent into `SAVE/muon-RANK.json`."""
    from megatron_patch.optimizers.muon import OrthogonalizedMomentum

    attach, found = OrthogonalizedMomentum.attach, []

    def noted(self, *args, **kwargs):
        found.append(self)
        attach(self, *args, **kwargs)

    OrthogonalizedMomentum.attach = noted
    code = start_program(argv)
    (optimizer,) = found
    state = [tensor for kept in optimizer.state.values() for tensor in kept.values() if torch.is_tensor(tensor) and tensor.dim()]
    master = list(optimizer.state)  # the tensors that are stepped; with ZeRO 3 groups are empty between steps
    counts = {
        "rank": int(os.environ["RANK"]),
        "state": sum(tensor.nbytes for tensor in state),
        "master": sum(tensor.nbytes for tensor in master),
        "sent": sum(exchange.sent_bytes for exchange in optimizer.exchanges),
    }
    (Path(argv[argv.index("--save") + 1]) / f"muon-{counts['rank']}.json").write_text(json.dumps(counts))
    return code


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--zero-stage 1 --bf16"),
        (4, "--zero-stage 0 --tensor-model-parallel-size 2"),
        pytest.param(2, "--zero-stage 3 --bf16", marks=pytest.mark.slow),
        pytest.param(4, "--zero-stage 3 --tensor-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param(4, "--zero-stage 2", marks=pytest.mark.slow),
        pytest.param(4, "--zero-stage 1 --bf16 --pipeline-model-parallel-size 2", marks=pytest.mark.slow),
    ],
)
def test_states_and_traffic_are_the_planned_ones(tmp_path, corpus, ranks, layout):
    plan = f"--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --patch-size 1 --train-tokens {STEPS * 128} --lr 3e-3"
    words = command(plan, "--optimizer muon", layout)
    run = train(tmp_path / "run", ranks, words, "--data-path", corpus, main=measure)
    assert len(run.losses) == STEPS
    config = load_config([*MODEL, *DATA, *words, "--dry-run", "--world-size", str(ranks)], 1)
    planned = layout_of(config, make_engine_config(config))
    parts = pipeline_parts(config.shape, config.plan, planned)
    measured = [json.loads((run.folder / f"muon-{rank}.json").read_text()) for rank in range(ranks)]
    for number, part in enumerate(parts):
        mine = measured[number * part.ranks : (number + 1) * part.ranks]
        step = matrix_step(config.shape, planned, part.layers)
        assert [row["sent"] for row in mine] == [STEPS * planned.element_bytes * elements for elements in step.sent]
        # Flat groups are padded by a few elements for each rank.
        for row in mine:
            master = row["master"] if planned.zero_level else 0
            assert 0 <= master + row["state"] - part.memory.optimizer < 1000
