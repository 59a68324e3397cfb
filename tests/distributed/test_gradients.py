"""No gradient is rounded below float32 between the backward pass of a micro-batch and the optimizer, in any layout.

Each gradient is compared with a float64 sum over micro-batches and ranks. ZeRO 0 to 3 on two ranks are compared in test_zero.py, and NVMe
in test_nvme.py, where these runs exist for other reasons.
"""

from __future__ import annotations

import json

import pytest

from megatron_patch.parallel.tensor import TensorParallel, all_reduce_gradient
from tests.distributed.gradients import FLOAT32_ERROR, checked_float16_program, checked_program, gradient_errors
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import printed, train

RUN = "--seq-length 16 --micro-batch-size 1 --global-batch-size 24 --patch-size 1 --train-tokens 4800 --lr 3e-3 --exit-interval 2"
PIPELINE, TIED = "--pipeline-model-parallel-size 2", "--no-untie-embeddings-and-output-weights"
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("ranks", "words", "settings"),
    [
        (1, "--bf16 --zero-stage 1", {}),
        (3, "--bf16 --zero-stage 2", {}),
        (2, f"--bf16 --zero-stage 0 {PIPELINE} {TIED}", {}),
        (2, f"--bf16 --zero-stage 1 {PIPELINE} {TIED}", OFFLOAD),
        (2, "--bf16 --zero-stage 1 --tensor-model-parallel-size 2 --sequence-parallel", {}),
        (8, f"--bf16 --zero-stage 1 --tensor-model-parallel-size 2 --sequence-parallel {PIPELINE} {TIED}", {}),
        (2, "--bf16 --zero-stage 2", OFFLOAD),
        pytest.param(2, "--bf16 --zero-stage 3", OFFLOAD, marks=pytest.mark.slow),
        pytest.param(2, "--fp16 --zero-stage 1", {}, marks=pytest.mark.slow),
        (3, "--fp16 --zero-stage 2", {}),
        pytest.param(2, "--fp16 --zero-stage 3", {}, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_the_sum_of_the_micro_batches_gradients(tmp_path, corpus, ranks, words, settings):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    # Clipping would scale the gradient; a dynamic loss scale would skip the first steps.
    more = "--clip-grad 0 --loss-scale 1024" if "--fp16" in words else "--clip-grad 0"
    program = checked_float16_program if "--fp16" in words else checked_program
    run = train(tmp_path / "run", ranks, RUN, words, more, f"--deepspeed_config {path} --data-path", corpus, main=program)
    errors = gradient_errors(run, ranks)
    assert len(errors) > 15 and max(errors.values()) < FLOAT32_ERROR, errors


def test_a_user_may_choose_another_type_and_is_told(tmp_path, corpus):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"communication_data_type": "bf16"}))
    words = f"--bf16 --zero-stage 1 --clip-grad 0 --deepspeed_config {path} --data-path"
    run = train(tmp_path / "run", 1, RUN, words, corpus, main=checked_program)
    assert max(gradient_errors(run, 1).values()) > 1e-4, "the comparison must notice gradients that were rounded to bfloat16"
    assert "gradients are summed over ranks in bf16" in " ".join(printed(run.folder).split())


def sum_of_rounded_gradients(size: int) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    weight = torch.ones(512, dtype=torch.bfloat16, requires_grad=True)
    parts = torch.randn(size, 512, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    parallel = TensorParallel(dist.get_rank(), size, dist.group.WORLD, sequence=True)
    (all_reduce_gradient(weight, parallel) * parts[dist.get_rank()]).sum().backward()
    # A single rounding, that of the result, as for the gradient of a norm on one rank.
    return float((weight.grad - parts.float().sum(dim=0).to(torch.bfloat16)).abs().max())


def test_tensor_parallel_ranks_sum_the_gradients_of_norms_in_float32(tmp_path):
    assert run_ranks(sum_of_rounded_gradients, 4, tmp_path / "logs", 4) == [0.0] * 4
