"""With ZeRO 3 and NVMe offload, training, the switch, saving and resuming give the results of training in memory.

Skipped if DeepSpeed is installed without its operator async_io; docs/parallelism.md shows how to build it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megatron_patch.engine.swapping import require_async_io
from megatron_patch.errors import ConfigError
from tests.distributed.gradients import FLOAT32_ERROR, checked_program, gradient_errors
from tests.distributed.runs import Run, start_program, train
from tests.oracle.reference_muon import start_with_reference

# DeepSpeed keeps tensors below 1 MiB in memory: half of a feed-forward matrix is larger (in bfloat16, of one that is twice as wide), the
# weight of a norm is smaller.
WIDTHS = {"fp32": "2048", "bf16": "4096"}
MODEL = "--hidden-size 256 --seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 1e-3"
BUFFERS = {"offload_optimizer": {"buffer_count": 8}, "offload_param": {"buffer_size": 600_000, "buffer_count": 8, "max_in_cpu": 0}}
STEPS_BEFORE, STEPS = 5, 12
MUON = "--optimizer muon"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def operator() -> None:
    try:
        require_async_io()
    except ConfigError as error:
        pytest.skip(error.what)


def plan(optimizer: str, precision: str = "fp32") -> list[str]:
    """Returns a model and a plan whose switch after step 6 keeps or resets the optimizer."""
    stages = [{"patch_size": 3, "steps": 6}, {"patch_size": 1, "steps": 6, "lr_policy": "continue", "optimizer": optimizer}]
    return [
        *MODEL.split(),
        "--clip-grad",
        "0",
        "--ffn-hidden-size",
        WIDTHS[precision],
        "--eval-interval",
        "5",
        "--stages",
        json.dumps(stages),
        "--data-path",
    ]


def offload(folder: Path, devices: dict[str, str], **more: object) -> list[str]:
    """Writes a DeepSpeed JSON that makes three sub-groups of weights that go to NVMe and one of norms that is too small, and returns the flag."""
    parts = {part: {"device": device} for part, device in devices.items()}
    for part, device in devices.items():
        if device == "nvme":
            parts[part] |= {"nvme_path": str(folder / "nvme"), **BUFFERS[part], **more}
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 500_000, **parts}}))
    return ["--deepspeed_config", str(path)]


@pytest.fixture(scope="module")
def single(tmp_path_factory, corpus, operator) -> Callable[..., Run]:
    """Returns the run of one process in float32 and in memory with a plan; each is trained when it is first used."""
    folder = tmp_path_factory.mktemp("single")

    @cache
    def run(optimizer: str, precision: str, muon: bool = False) -> Run:
        program = start_with_reference if muon else start_program
        words = f"--zero-stage 0 {MUON if muon else ''}"
        return train(folder / f"{optimizer}-{precision}-{muon}", 1, words, plan(optimizer, precision), corpus, main=program)

    return run


QUICK = [
    ({"offload_optimizer": "nvme", "offload_param": "nvme"}, "keep", "", 2),
    ({"offload_optimizer": "cpu", "offload_param": "nvme"}, "reset", "--bf16", 2),
    ({"offload_optimizer": "nvme", "offload_param": "nvme"}, "reset", TENSOR, 2),
    ({"offload_optimizer": "nvme"}, "keep", MUON, 2),
]
SLOW = [
    (devices, optimizer, words, 2)
    for devices in (
        {"offload_optimizer": "nvme"},
        {"offload_optimizer": "nvme", "offload_param": "nvme"},
        {"offload_optimizer": "cpu", "offload_param": "nvme"},
        {"offload_param": "nvme"},
    )
    for optimizer in ("keep", "reset")
    for words in ("", "--bf16", TENSOR, f"--bf16 {TENSOR}", MUON, f"{MUON} {TENSOR}")
]


@pytest.mark.parametrize(
    ("devices", "optimizer", "words", "ranks"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK)],
)
def test_what_is_on_nvme_computes_the_same_and_resumes(tmp_path, corpus, single, devices, optimizer, words, ranks):
    precision = "bf16" if "--bf16" in words else "fp32"
    command = [*words.split(), *offload(tmp_path, devices), *plan(optimizer, precision), corpus]
    train(tmp_path / "run", ranks, f"--exit-interval {STEPS_BEFORE}", command)
    muon = MUON in words
    for part, files in (("offload_optimizer", "momentum-*.swp" if muon else "exp_avg-*.swp"), ("offload_param", "*_param.tensor.swp")):
        assert any((tmp_path / "nvme").rglob(files)) == (devices.get(part) == "nvme")
    run, expected = train(tmp_path / "run", ranks, command, main=checked_program), single(optimizer, precision, muon)
    assert max(gradient_errors(run, ranks).values()) < FLOAT32_ERROR
    loss, norm = (1e-2, 5e-2) if precision == "bf16" else (1e-5, 1e-4)
    assert len(run.losses) == STEPS
    assert run.losses == pytest.approx(expected.losses, rel=loss)
    assert run.values("grad_norm") == pytest.approx(expected.values("grad_norm"), rel=norm)
    evaluations = [[record["token_loss"] for record in each.records("evaluation")] for each in (run, expected)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=loss)


def test_a_checkpoint_moves_onto_nvme_and_off_it_again(tmp_path, corpus, single):
    common = [*plan("keep"), corpus]
    words = offload(tmp_path, {"offload_optimizer": "nvme"}, pipeline_read=True, pipeline_write=True)
    train(tmp_path / "run", 1, f"--zero-stage 1 --exit-interval {STEPS_BEFORE}", common)
    train(tmp_path / "run", 3, "--async-save --exit-interval 8", words, common)
    assert any((tmp_path / "nvme").rglob("exp_avg-*.swp"))
    run = train(tmp_path / "run", 2, "--zero-stage 2", common)
    assert run.losses == pytest.approx(single("keep", "fp32").losses, rel=1e-5)
