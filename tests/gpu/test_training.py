"""A complete run on a GPU: both stages in float32, bf16 and fp16, compared with the same run on the CPU. Several can run at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_patch.engine.environment import free_port
from tests.distributed.runs import DATA, MODEL, ROOT, Run, command, make_corpus

pytestmark = pytest.mark.gpu
PLAN = "--seq-length 16 --micro-batch-size 4 --global-batch-tokens 256 --patch-size 4 --patch-fraction 0.5 --train-tokens 8192 --lr 3e-3"


def train(folder, corpus, *more, device="cuda"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    words = command(MODEL, DATA, PLAN, *more, "--data-path", corpus, "--save", str(folder))
    done = subprocess.run([sys.executable, str(ROOT / "pretrain_gpt_patch.py"), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Run(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, corpus):
    return train(tmp_path_factory.mktemp("cpu"), corpus, device="cpu").values("loss")


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ("--zero-stage 0", 1e-3),
        ("--zero-stage 1", 1e-3),
        ("--zero-stage 3", 1e-3),
        ("--bf16 --zero-stage 0", 3e-2),
        ("--bf16 --zero-stage 1", 3e-2),
        ("--bf16 --zero-stage 3", 3e-2),
        ("--bf16 --zero-stage 1 --recompute-granularity full", 3e-2),
        ("--fp16 --zero-stage 1 --initial-loss-scale 1024", 3e-2),
        ("--bf16 --zero-stage 1 --compile", 3e-2),
        ("--zero-stage 1 --operators plain", 1e-3),
    ],
)
def test_a_run_on_a_gpu_follows_the_cpu_s(tmp_path, corpus, on_cpu, flags, tolerance):
    run = train(tmp_path / "run", corpus, flags)
    assert run.values("loss") == pytest.approx(on_cpu, rel=tolerance)
    assert all(record["memory_gib"] > 0 for record in run.records("step"))


def test_a_resumed_run_repeats_no_step(tmp_path, corpus):
    whole = train(tmp_path / "whole", corpus, "--bf16 --zero-stage 1")
    train(tmp_path / "parts", corpus, "--bf16 --zero-stage 1 --exit-interval 10")
    parts = train(tmp_path / "parts", corpus, "--bf16 --zero-stage 1")
    assert parts.values("loss") == pytest.approx(whole.values("loss"), rel=1e-4)
