"""With ZeRO 3 and NVMe offload, training, the switch, saving and resuming give the results of training in memory.

Skipped if DeepSpeed is installed without its operator async_io; docs/parallelism.md shows how to build it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_patch.engine.swapping import require_async_io
from megatron_patch.errors import ConfigError
from tests.distributed.runs import Run, train

# DeepSpeed keeps tensors below 1 MiB in memory: half of a feed-forward matrix is larger, the weight of a norm is smaller.
MODEL = "--hidden-size 256 --ffn-hidden-size 2048 --seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 1e-3"
BUFFERS = {"offload_optimizer": {"buffer_count": 8}, "offload_param": {"buffer_size": 600_000, "buffer_count": 8, "max_in_cpu": 0}}
STEPS_BEFORE, STEPS = 5, 12


@pytest.fixture(scope="module")
def operator() -> None:
    try:
        require_async_io()
    except ConfigError as error:
        pytest.skip(error.what)


def plan(optimizer: str) -> list[str]:
    """Returns a plan whose switch after step 6 keeps or resets the optimizer."""
    stages = [{"patch_size": 3, "steps": 6}, {"patch_size": 1, "steps": 6, "lr_policy": "continue", "optimizer": optimizer}]
    return [*MODEL.split(), "--eval-interval", "5", "--stages", json.dumps(stages), "--data-path"]


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
def single(tmp_path_factory, corpus, operator) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("single")
    return {how: train(folder / how, 1, "--zero-stage 0", plan(how), corpus) for how in ("keep", "reset")}


@pytest.mark.parametrize("optimizer", ["keep", "reset"])
@pytest.mark.parametrize(
    "devices",
    [
        {"offload_optimizer": "nvme"},
        {"offload_optimizer": "nvme", "offload_param": "nvme"},
        {"offload_optimizer": "cpu", "offload_param": "nvme"},
        {"offload_param": "nvme"},
    ],
)
def test_what_is_on_nvme_computes_the_same_and_resumes(tmp_path, corpus, single, optimizer, devices):
    words = [*offload(tmp_path, devices), *plan(optimizer), corpus]
    train(tmp_path / "run", 2, f"--exit-interval {STEPS_BEFORE}", words)
    for part, files in (("offload_optimizer", "exp_avg-*.swp"), ("offload_param", "*_param.tensor.swp")):
        assert any((tmp_path / "nvme").rglob(files)) == (devices.get(part) == "nvme")
    run = train(tmp_path / "run", 2, words)
    assert len(run.losses) == STEPS
    assert run.losses == pytest.approx(single[optimizer].losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(single[optimizer].values("grad_norm"), rel=1e-4)
    for ours, expected in zip(run.records("evaluation"), single[optimizer].records("evaluation"), strict=True):
        assert ours["token_loss"] == pytest.approx(expected["token_loss"], rel=1e-5)


def test_a_checkpoint_moves_onto_nvme_and_off_it_again(tmp_path, corpus, single):
    common = [*plan("keep"), corpus]
    words = offload(tmp_path, {"offload_optimizer": "nvme"}, pipeline_read=True, pipeline_write=True)
    train(tmp_path / "run", 1, f"--zero-stage 1 --exit-interval {STEPS_BEFORE}", common)
    train(tmp_path / "run", 3, "--async-save --exit-interval 8", words, common)
    assert any((tmp_path / "nvme").rglob("exp_avg-*.swp"))
    run = train(tmp_path / "run", 2, "--zero-stage 2", common)
    assert run.losses == pytest.approx(single["keep"].losses, rel=1e-5)
