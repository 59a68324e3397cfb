"""A checkpoint written by version 0.1 (commit d175b01) resumes as in that version, through the switch to tokens.

The folder written_by_0_1 contains the checkpoint of step 5, the corpus, and the metrics of version 0.1 for the full run on one process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_patch.engine.inference import load_model
from tests.distributed.runs import Run, command, start_process

FOLDER = Path(__file__).parent / "written_by_0_1"
FLAGS = command(
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --num-query-groups 1 --ffn-hidden-size 32 --seq-length 8",
    "--micro-batch-size 2 --global-batch-size 4 --patch-size 4 --patch-fraction 0.5 --train-tokens 2048 --lr 3e-3",
    "--lr-warmup-fraction 0.1 --eval-interval 8 --zero-stage 1",
)


def test_a_checkpoint_of_version_0_1_resumes_through_the_switch(tmp_path, monkeypatch):
    """The same losses, learning rates and gradient norms as version 0.1 had after its step 5, and the same evaluations."""
    shutil.copytree(FOLDER, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")  # --data-path is part of what a run must keep
    assert load_model("run").checkpoint.state.step == 5
    process = start_process(FLAGS, "--data-path corpus --save run", log=tmp_path / "log")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    run, expected = Run(tmp_path / "x" / "run"), json.loads((FOLDER / "expected.json").read_text())
    for kind, records in (("step", expected["steps"]), ("evaluation", expected["evaluations"])):
        found = run.records(kind)
        assert [record["step"] for record in found] == [record["step"] for record in records]
        for record, before in zip(found, records, strict=True):
            assert {name: record[name] for name in before} == pytest.approx(before, rel=1e-5), record["step"]
    state = json.loads((tmp_path / "x" / "run" / "step-00000064" / "trainer_state.json").read_text())
    assert state["version"] == 2 and state["stage_name"] == "token" and state["guard"]["losses"]
