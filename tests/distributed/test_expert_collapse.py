"""A run whose routers collapse says so once for each block and stage, on the console and in events.jsonl."""

from __future__ import annotations

import json
from unittest import mock

from megatron_patch.training import expert_load
from tests.distributed.runs import printed, start_program, train

WORDS = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --log-interval 4"
EXPERTS = "--num-layers 3 --num-experts 8 --moe-ffn-hidden-size 24 --moe-layer-freq [0,1,1]"


def start_with_a_short_window(argv: list[str]) -> int:
    """Runs the program on one rank; four steps with a load of 1.3 are a collapse."""
    with mock.patch.multiple(expert_load, WINDOW=4, LARGEST_IMBALANCE=0.1):
        return start_program(argv)


def test_a_collapse_is_an_event_for_each_block_and_stage(tmp_path, corpus):
    run = train(tmp_path / "run", 2, WORDS, EXPERTS, "--data-path", corpus, main=start_with_a_short_window)
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    switch = next(event["step"] for event in events if event["type"] == "switch")
    found = {(event["stage"], event["block"]): event for event in events if event["type"] == "collapse"}
    assert list(found) == [("patch", 1), ("patch", 2), ("token", 1), ("token", 2)]
    loads, dead = run.values("expert_load"), run.values("dead_experts")
    for (stage, block), event in found.items():
        step = event["step"]
        assert step == (8 if stage == "patch" else switch + 4)
        for name, values, digits in (("expert_load", loads, 3), ("dead_experts", dead, 2)):
            assert event[name] == round(sum(value[block - 1] for value in values[step - 4 : step]) / 4, digits)
        assert "raise --moe-aux-loss-coeff (now 0.01), or moe_aux_loss_coeff of " in event["message"]
    assert printed(run.folder).count("collapse: the experts of block 1 have collapsed") == 2, "one rank prints"
    assert sum("experts" in line and "FLOPs" in line for line in printed(run.folder).splitlines()) == 1
