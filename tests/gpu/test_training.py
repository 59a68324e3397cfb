"""A complete run on a GPU: both stages in float32, bf16 and fp16, compared with the same run on the CPU. Several can run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_patch.engine.environment import free_port
from megatron_patch.optimizers.newton_schulz import newton_schulz
from tests.distributed.runs import DATA, MODEL, ROOT, Run, command, make_corpus

pytestmark = pytest.mark.gpu
PLAN = "--seq-length 16 --micro-batch-size 4 --global-batch-tokens 256 --patch-size 4 --patch-fraction 0.5 --train-tokens 8192 --lr 3e-3"


MUON = "--optimizer muon"
DOCUMENTS = "--eod-token-id 63 --reset-attention-mask --reset-position-ids --eod-mask-loss"


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


@pytest.fixture(scope="module")
def documents_on_cpu(tmp_path_factory, corpus):
    return train(tmp_path_factory.mktemp("documents-cpu"), corpus, DOCUMENTS, device="cpu").values("loss")


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ("--zero-stage 1", 1e-3),
        ("--bf16 --zero-stage 3", 3e-2),
        ("--bf16 --zero-stage 1 --recompute-granularity selective", 3e-2),
        ("--fp16 --zero-stage 1 --initial-loss-scale 1024", 3e-2),
        ("--bf16 --zero-stage 1 --compile", 3e-2),
    ],
)
def test_documents_on_a_gpu_follow_those_on_the_cpu(tmp_path, corpus, documents_on_cpu, on_cpu, flags, tolerance):
    run = train(tmp_path / "run", corpus, DOCUMENTS, flags)
    assert run.values("loss") == pytest.approx(documents_on_cpu, rel=tolerance)
    assert documents_on_cpu != pytest.approx(on_cpu, rel=1e-3)


@pytest.fixture(scope="module")
def muon_on_cpu(tmp_path_factory, corpus):
    return train(tmp_path_factory.mktemp("muon-cpu"), corpus, MUON, device="cpu").values("loss")


@pytest.mark.parametrize(
    ("flags", "offloaded", "tolerance"),
    [
        ("--zero-stage 0", False, 1e-3),
        ("--zero-stage 1", False, 1e-3),
        ("--zero-stage 3", False, 1e-3),
        ("--bf16 --zero-stage 1", False, 3e-2),
        ("--bf16 --zero-stage 3", False, 3e-2),
        ("--fp16 --zero-stage 1 --initial-loss-scale 1024", False, 3e-2),
        ("--fp16 --zero-stage 3 --initial-loss-scale 1024", False, 3e-2),
        # Masters and momentum are in host memory; matrices are orthogonalized on the GPU and exchanged by NCCL.
        ("--bf16 --zero-stage 1", True, 3e-2),
        ("--zero-stage 2", True, 1e-3),
        ("--bf16 --zero-stage 3", True, 3e-2),
    ],
)
def test_muon_on_a_gpu_follows_muon_on_the_cpu(tmp_path, corpus, muon_on_cpu, flags, offloaded, tolerance):
    if offloaded:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
        flags = f"{flags} --deepspeed_config {path}"
    assert train(tmp_path / "run", corpus, MUON, flags).values("loss") == pytest.approx(muon_on_cpu, rel=tolerance)


def test_an_overflow_of_float16_skips_muon_s_step(tmp_path, corpus):
    """A loss scale that is far too large: no skipped step changes the weights, and training continues with a smaller scale."""
    run = train(tmp_path / "run", corpus, MUON, f"--fp16 --zero-stage 1 --initial-loss-scale {2**24}")
    skipped = [record["step"] for record in run.records("step") if record["skipped"]]
    losses = run.values("loss")
    assert skipped and skipped[0] == 1 and len(skipped) < len(losses) // 2
    assert all(loss is not None for loss in losses) and losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("shape", [(4, 96, 512), (3, 512, 96), (2, 256, 256)])
def test_orthogonalization_in_float32_does_not_use_tf32(shape):
    """TF32 rounds factors to 11 bits, which gives errors of 1e-3."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = newton_schulz(matrices.cuda()).cpu().double()
    expected = newton_schulz(matrices.double())
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_a_resumed_run_repeats_no_step(tmp_path, corpus):
    whole = train(tmp_path / "whole", corpus, "--bf16 --zero-stage 1")
    train(tmp_path / "parts", corpus, "--bf16 --zero-stage 1 --exit-interval 10")
    parts = train(tmp_path / "parts", corpus, "--bf16 --zero-stage 1")
    assert parts.values("loss") == pytest.approx(whole.values("loss"), rel=1e-4)
