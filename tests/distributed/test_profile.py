"""Profiles of whole runs: the steps and their parts are in the trace, and the steps compute the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter

from megatron_patch.engine.ranges import PREFIX
from tests.distributed.runs import command, printed, train

COMMON = command("--seq-length 16 --micro-batch-size 2 --lr 3e-3 --data-path")
STAGES = ["--stages", json.dumps([{"patch_size": 2, "steps": 3}, {"patch_size": 1, "steps": 4}])]


def ranges(path):
    """How often each named part of a step is in a trace, and all its events."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"].removeprefix(PREFIX) for event in events if event.get("name", "").startswith(PREFIX)]
    return Counter(names), events


def test_a_profile_across_the_switch_has_each_part_and_changes_nothing(tmp_path, corpus):
    words = [*COMMON, corpus, *STAGES, *command("--global-batch-size 4 --zero-stage 1 --eval-interval 4")]
    plain = train(tmp_path / "plain", 1, words)
    run = train(tmp_path / "run", 1, words, "--profile 3-5 --profile-shapes")
    assert run.losses == plain.losses and run.values("grad_norm") == plain.values("grad_norm")
    (path,) = (run.folder / "profile").iterdir()
    assert path.name == "rank-0-step-3-5.json.gz"
    names, events = ranges(path)
    assert (names["step"], names["data"], names["optimizer"]) == (3, 3, 3) and names["forward"] == names["backward"] == 5
    assert names["switch"] == names["save"] == 1 and names["evaluation"] == 2, "at the end of step 3, and at step 4"
    assert sum(event.get("name") == "ProfilerStep#3" for event in events) <= 1
    assert any("Input Dims" in event.get("args", {}) for event in events)
    said = printed(run.folder)
    assert f"the profile of rank 0 is in {path} (" in said and "open it at https://ui.perfetto.dev" in said
    assert "operator on the CPU, without what it calls" in said and "aten::" in said


def test_chosen_ranks_of_a_pipeline_are_profiled_from_the_first_step(tmp_path, corpus):
    words = [*COMMON, corpus, *STAGES, *command("--global-batch-size 4 --zero-stage 1 --pipeline-model-parallel-size 2")]
    run = train(tmp_path / "run", 2, words, "--profile 1 --profile-ranks 0 1")
    found = {path.name: ranges(path)[0] for path in (run.folder / "profile").iterdir()}
    first, second = (found[f"rank-{rank}-step-1-1.json.gz"] for rank in (0, 1))
    assert first["step"] == second["step"] == first["optimizer"] == 1 and first["forward"] == second["backward"] == 1
    assert first["send activation"] == second["recv activation"] == first["recv grad"] == 1
    assert "the profile of rank 1 is in " in printed(run.folder)
