"""Checkpoints written in the background: the same files, the same order of events, and errors on every rank."""

from __future__ import annotations

import json

from megatron_patch.checkpoint import commit as files
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, printed, train
from tests.faults.conftest import PLAN


def _with_slow_disk(argv: list[str]) -> int:
    """Rank 1's files take so long that training continues for many steps meanwhile."""
    import os
    import time

    from megatron_patch.engine import deepspeed_engine
    from megatron_patch.training.pretrain import main

    write = deepspeed_engine.write_fragments

    def slow(*args):
        time.sleep(0.5 if os.environ["RANK"] == "1" else 0)
        return write(*args)

    deepspeed_engine.write_fragments = slow
    return main(argv)


def test_files_are_those_of_the_synchronous_run(tmp_path, corpus, undisturbed):
    """On a slow disk, where the weights have changed long before they are written."""
    argv = command(MODEL, DATA, PLAN, "--async-save --save-interval 4 --data-path", [corpus], ["--save", str(tmp_path / "run")])
    assert run_ranks(_with_slow_disk, 2, tmp_path / "run-logs", argv) == [0, 0]
    run = Run(tmp_path / "run")
    assert run.losses == undisturbed.losses
    found = files.list_checkpoints(run.folder)
    assert len(found) >= 4 and not list(run.folder.glob(".partial*"))
    for folder in found:
        ours, theirs = files.read_manifest(folder), files.read_manifest(undisturbed.folder / folder.name)
        weights = [name for name in ours if name.startswith("state-")]
        assert len(weights) == 2 and [ours[name] for name in weights] == [theirs[name] for name in weights]
        assert files.verify(folder) == []
    records = run.records("save")
    assert [record["step"] for record in records] == sorted(files.step_of(folder) for folder in found)
    assert all(0 < record["stall_seconds"] <= record["seconds"] and record["seconds"] >= 0.5 for record in records)
    # The metrics file shows that some were committed after later steps.
    order = [(r["type"], r["step"]) for r in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())]
    assert any(kind == "save" and ("step", step + 1) in order[:at] for at, (kind, step) in enumerate(order))


def test_synchronous_records_say_that_training_waited(undisturbed):
    assert all(record["stall_seconds"] == record["seconds"] for record in undisturbed.records("save"))


def _failing_on_rank_1(argv: list[str]) -> int:
    import os
    import resource

    from megatron_patch.training.pretrain import main

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    return main(argv)


def test_an_error_on_one_rank_is_raised_on_all_at_the_same_step(tmp_path, corpus, undisturbed):
    folder = tmp_path / "run"
    train(folder, 2, PLAN, "--async-save --exit-interval 4 --data-path", corpus)
    before = files.find_newest_valid(folder)
    argv = command(MODEL, DATA, PLAN, "--async-save --data-path", [corpus], ["--save", str(folder)])
    assert run_ranks(_failing_on_rank_1, 2, tmp_path / "run-logs", argv) == [4, 4]
    text = printed(folder)
    assert text.count("CheckpointError: cannot write") == 1 and "File too large" in text and "Traceback" not in text
    assert files.find_newest_valid(folder).folder == before.folder and not list(folder.glob(".partial*"))
    assert train(folder, 2, PLAN, "--async-save --data-path", corpus).losses == undisturbed.losses
