"""The host does not wait for the GPU between the micro-batches of a step: no operation needs a value from the device."""

from __future__ import annotations

import collections

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command

PLAN = (
    "--seq-length 16 --micro-batch-size 1 --global-batch-size 16 --patch-size 4 --train-tokens 3072 --lr 1e-3 --num-layers 3 --split 1,0,0"
)


def _waits(argv):
    """Trains and returns (micro-batches, reads of device values, synchronizations) of each step."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_patch.engine.data_parallel import DataParallelEngine
    from megatron_patch.engine.pipeline_parallel import PipelineParallelEngine
    from megatron_patch.training.pretrain import main

    waits = collections.Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            waits["numbers"] += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
            return func(*args, **(kwargs or {}))

    def synchronize(device=None):
        waits["synchronizations"] += 1

    get_accelerator().synchronize = synchronize
    steps = []
    for engine in (DataParallelEngine, PipelineParallelEngine):

        def counted(self, batches, *arguments, step=engine.train_step):
            waits.clear()
            with Counting():
                result = step(self, batches, *arguments)
            steps.append((len(batches), waits["numbers"], waits["synchronizations"]))
            return result

        engine.train_step = counted
    assert main(argv) == 0
    return steps


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--bf16 --zero-stage 1"),
        (1, "--bf16 --zero-stage 1 --reset-attention-mask --eod-token-id 63"),
        (1, "--bf16 --zero-stage 0"),
        (1, "--bf16 --zero-stage 3 --recompute-granularity full"),
        (2, "--bf16 --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 2"),
        (2, "--bf16 --pipeline-model-parallel-size 2"),
    ],
)
def test_micro_batches_do_not_wait_for_the_device(tmp_path, corpus, ranks, layout):
    argv = command(MODEL, DATA, PLAN, layout, "--data-path", corpus, ["--save", str(tmp_path / "run")])
    for steps in run_ranks(_waits, ranks, tmp_path / "logs", argv):
        few, many = ([step for step in steps if step[0] == count] for count in (4, 16))
        assert len(few) > 3 and len(many) > 3
        # Without each stage's first steps, in which pipeline ranks exchange the shapes.
        assert {step[1] for step in few[2:]} == {step[1] for step in many[2:]}, (
            "the number of waits does not depend on the number of micro-batches"
        )
        assert max(step[1] for step in few[2:]) <= 8, "loss, norm and overflow are read once per step"
        assert all(step[2] == 0 for step in steps)
