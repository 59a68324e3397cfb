"""Muon under every layout computes what one process computes with torch's Muon; see tests/oracle/reference_muon.py.

Momentum, weights and checkpoints are those of whole matrices, whatever the partitions. The tolerance of float32 is 1e-5; seen are 1e-7.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint import commit as files
from tests.distributed import test_moves as moves
from tests.distributed.matrix import PLAN, Combination, combinations, compare
from tests.distributed.runs import Run, command, printed, start_program, train
from tests.oracle.reference_muon import start_with_reference

MUON = Combination(zero=1, model="tied", optimizer="muon")
REPLICAS = "--check-replicas-interval 1"


def deepspeed_json(folder: Path, **zero: object) -> str:
    """Writes a DeepSpeed JSON with settings of ZeRO and returns the flag."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return f"--deepspeed_config {path}"


def offload(level: int) -> dict[str, object]:
    return {"stage": level, "offload_optimizer": {"device": "cpu"}}


# name: (layout, settings of ZeRO). With `REPLICAS` all copies of a weight are compared bit for bit after each step.
MECHANISMS = {
    "ZeRO 0, tensor and data parallel": ({"tensor": 2, "data": 2, "zero": 0, "extra": REPLICAS}, {}),
    "ZeRO 1": ({"data": 2, "extra": REPLICAS}, {}),
    "ZeRO 2 in host memory": ({"data": 2, "zero": 2}, offload(2)),
    "ZeRO 3 with sub-groups": ({"data": 2, "zero": 3}, {"stage": 3, "sub_group_size": 6000}),
    "sharded by tensor, sequence and ZeRO 3": ({"tensor": 2, "data": 2, "sequence": True, "zero": 3, "length": "tokens"}, {}),
    "undivided keys": ({"tensor": 4, "sequence": True, "model": "qwen3, one group", "extra": REPLICAS}, {}),
    "tied pipeline": ({"pipeline": 2, "zero": 0, "extra": REPLICAS}, {}),
    "pipeline ranks with and without vocabulary": ({"pipeline": 3, "extra": "--hang-timeout 2min"}, {}),
    "bfloat16 with ZeRO 1": ({"data": 2, "extra": f"--bf16 {REPLICAS}"}, {}),
}
SLOW = {
    "bfloat16 with ZeRO 3": ({"data": 2, "zero": 3, "extra": "--bf16"}, {}),
    "tied pipeline with data": ({"pipeline": 2, "data": 2, "extra": REPLICAS}, {}),
    "ZeRO 1 in host memory": ({"data": 2}, offload(1)),
    "ZeRO 3 in host memory": ({"data": 2, "zero": 3}, offload(3)),
    "bfloat16 pipeline": ({"pipeline": 2, "extra": f"--bf16 {REPLICAS}"}, {}),
}


@pytest.mark.parametrize("mechanism", [*MECHANISMS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layout_equals_one_process(tmp_path, references, mechanism):
    layout, zero = {**MECHANISMS, **SLOW}[mechanism]
    extra = f"{layout.get('extra', '')} {deepspeed_json(tmp_path, **zero) if zero else ''}"
    combination = Combination(**{**vars(MUON), **layout, "extra": extra})
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


@pytest.mark.slow
@pytest.mark.parametrize("combination", combinations("muon"), ids=str)
def test_every_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


def _watched(argv: list[str], wave_limit: int | None = None) -> int:
    """The program, which writes into `SAVE/watched-RANK.json` what it exchanged and what state it kept.

    Args:
        argv: the command line.
        wave_limit: number of elements that an owner collects at a time; None: the default.
    """
    from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine
    from megatron_patch.optimizers import muon

    found: dict[str, object] = {}
    attach, orthogonalize, close = muon.OrthogonalizedMomentum.attach, muon.newton_schulz, DeepSpeedEngine.close
    dtypes = set()

    def attach_with_waves(self, units, group, device, dtype):
        more = {} if wave_limit is None else {"wave_limit": wave_limit}
        attach(self, units, group, device, dtype, **more)

    def watched_orthogonalize(matrices, *more):
        dtypes.add(str(matrices.dtype))
        return orthogonalize(matrices, *more)

    def watched_close(self):
        optimizer, wrapped = self._optimizer, self._engine.optimizer
        states = [{kind: value.numel() for kind, value in state.items() if value.numel() > 1} for state in optimizer.state.values()]
        found["states"] = {kind: sum(state.get(kind, 0) for state in states) for kind in ("momentum", "exp_avg", "exp_avg_sq")}
        found["kinds"] = sorted({" ".join(sorted(state)) for state in states})
        found["waves"] = [len(exchange.plan.waves) for exchange in optimizer.exchanges]
        found["dtypes"] = sorted(dtypes)
        found["precision"] = [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
        marked = [name for parameter, name in self._names.items() if hasattr(parameter, "use_muon")]
        marked += [key for group in optimizer.param_groups for key in group if "muon" in key]
        marked += [kind.__name__ for kind in type(optimizer).__mro__ if "muon" in kind.__name__.lower()]
        marked += [name for name in ("use_muon", "_uses_muon") if getattr(wrapped, name, False)]
        groups = getattr(wrapped, "bit16_groups", [])
        marked += [f"group {n}" for n, g in enumerate(groups) if hasattr(wrapped, "_is_muon_group") and wrapped._is_muon_group(g)]
        found["marked"] = marked
        close(self)

    muon.OrthogonalizedMomentum.attach, muon.newton_schulz = attach_with_waves, watched_orthogonalize
    DeepSpeedEngine.close = watched_close
    code = start_program(argv)
    (Path(argv[argv.index("--save") + 1]) / f"watched-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


def _with_small_waves(argv: list[str]) -> int:
    return _watched(argv, wave_limit=2000)


def watched(run: Run) -> list[dict]:
    """Returns what each rank of `_watched` wrote."""
    return [json.loads(path.read_text()) for path in sorted(run.folder.glob("watched-*.json"))]


# Of the model of `runs.py` with three layers: query and output, key and value, gate, up and down. Embeddings are tied and padded to 128 rows.
HIDDEN_ELEMENTS = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
OTHER_ELEMENTS = 128 * 32 + 7 * 32


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_state_waves_and_precision(tmp_path, references, zero):
    """Small exchanges give the same losses. One momentum is kept for each element of a hidden matrix, two moments for all others; ZeRO
    divides them. Matrices are orthogonalized in float32, and nothing makes DeepSpeed treat them as those of its own Muon."""
    words = command(PLAN, MUON.reference, f"--zero-stage {zero} --data-path", references.corpus)
    run = train(tmp_path / "run", 2, words, main=_with_small_waves)
    assert run.losses == pytest.approx(references(MUON.reference).losses, rel=1e-5)
    ranks = watched(run)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["marked"] == [] and rank["precision"] == ["highest", False]
        assert rank["kinds"] == ["exp_avg exp_avg_sq", "momentum"]
        assert sum(rank["waves"]) >= 3
    assert {dtype for rank in ranks for dtype in rank["dtypes"]} == {"torch.float32"}
    copies = 2 if zero == 0 else 1
    for kind, elements in (("momentum", HIDDEN_ELEMENTS), ("exp_avg", OTHER_ELEMENTS), ("exp_avg_sq", OTHER_ELEMENTS)):
        held = sum(rank["states"][kind] for rank in ranks)
        assert copies * elements <= held <= copies * elements + 64, f"{kind}: DeepSpeed pads a partition by a few elements"


def test_bfloat16_orthogonalizes_in_bfloat16(tmp_path, references):
    words = command(PLAN, MUON.reference, "--bf16 --zero-stage 1 --exit-interval 2 --data-path", references.corpus)
    ranks = watched(train(tmp_path / "run", 2, words, main=_watched))
    assert {dtype for rank in ranks for dtype in rank["dtypes"]} == {"torch.bfloat16"}
    assert [rank["marked"] for rank in ranks] == [[], []]


LAYOUTS = {
    **moves.LAYOUTS,
    "TP2 DP2 ZeRO-3": (4, "--tensor-model-parallel-size 2 --zero-stage 3"),
    "TP2 ZeRO-0": (2, "--tensor-model-parallel-size 2 --zero-stage 0"),
}


def test_from_layout_to_layout_through_the_switch(tmp_path, corpus, monkeypatch):
    """One run that changes its layout six times, also directly before, at and after the switch, equals an unbroken one."""
    monkeypatch.setattr(moves, "PLAN", f"{moves.PLAN} --optimizer muon")
    monkeypatch.setattr(moves, "LAYOUTS", LAYOUTS)
    single = train(tmp_path / "single", 1, moves.PLAN, "--zero-stage 0 --data-path", corpus, main=start_with_reference)
    at = moves.SWITCH
    for stop, layout in ((3, "PP2"), (6, "TP2 DP2 ZeRO-3"), (at - 1, "TP2 ZeRO-0"), (at, "TP2 PP2"), (at + 1, "ZeRO-3"), (at + 4, "PP2")):
        moves.resume(tmp_path / "run", [corpus], layout, stop)
    moves.check(moves.resume(tmp_path / "run", [corpus], "DP2 ZeRO-1"), single)


@pytest.fixture(scope="module")
def through_the_switch(tmp_path_factory, corpus):
    """Returns (flags of a run whose switch has a policy, the losses of torch's Muon)."""
    folder = tmp_path_factory.mktemp("switch")

    @cache
    def run(policy: str) -> tuple[list[str], list[float]]:
        stages = [{"patch_size": 4, "steps": 6}, {"patch_size": 1, "steps": 6, "lr_policy": "continue", "optimizer": policy}]
        words = command(
            "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 3e-3 --optimizer muon --stages", [json.dumps(stages)]
        )
        words += ["--data-path", corpus]
        return words, train(folder / policy, 1, "--zero-stage 0", words, main=start_with_reference).losses

    return run


POLICIES = [(policy, zero) for policy in ("keep", "reset", "reset_moments") for zero in (0, 1, 3)]
QUICK_POLICIES = [("keep", 0), ("keep", 1), ("reset_moments", 3)]


@pytest.mark.parametrize(
    ("policy", "zero"), [*QUICK_POLICIES, *(pytest.param(*case, marks=pytest.mark.slow) for case in POLICIES if case not in QUICK_POLICIES)]
)
def test_the_switch_keeps_or_zeroes_momentum(tmp_path, through_the_switch, policy, zero):
    words, losses = through_the_switch(policy)
    assert train(tmp_path / "run", 2, f"--zero-stage {zero}", words).losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_policies_at_the_switch_differ(through_the_switch):
    losses = [through_the_switch(policy)[1] for policy in ("keep", "reset", "reset_moments")]
    assert len({tuple(run) for run in losses}) == 3 and len({tuple(run[:7]) for run in losses}) == 1


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(tmp_path, corpus):
    """The step after it changes momentum in place, on the other rank perhaps before it is written."""
    words = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 3e-3 --patch-size 4 --train-tokens 1536")
    words += command("--optimizer muon --zero-stage 1 --save-interval 2 --keep-last 0 --data-path", corpus)
    runs = [train(tmp_path / name, 2, words, flag) for name, flag in (("now", ""), ("later", "--async-save"))]
    assert runs[0].losses == runs[1].losses
    now, later = (files.list_checkpoints(run.folder) for run in runs)
    assert len(now) >= 4 and [folder.name for folder in now] == [folder.name for folder in later]
    for one, other in zip(now, later, strict=True):
        parts = [
            {name: entry for name, entry in files.read_manifest(folder).items() if name.startswith("state-")} for folder in (one, other)
        ]
        assert len(parts[0]) == 2 and parts[0] == parts[1]


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_starts_from_the_weights_only(tmp_path, corpus, before, after):
    words = command(
        "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 3e-3 --patch-size 4 --train-tokens 1536 --zero-stage 1"
    )
    words += ["--data-path", corpus]
    train(tmp_path / "run", 1, words, f"--optimizer {before} --exit-interval 3")
    train(tmp_path / "run", 1, words, f"--optimizer {after}", expect=4)
    text = " ".join(printed(tmp_path / "run").split())
    assert f"--optimizer {after} (checkpoint: {before})" in text and "--finetune --load" in text and "Traceback" not in text
    run = train(tmp_path / "other", 1, words, f"--optimizer {after} --finetune --load {tmp_path / 'run'}")
    assert len(run.losses) == 8 and all(math.isfinite(loss) for loss in run.losses)
