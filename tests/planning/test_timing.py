"""Executed FLOPs, traffic and bubble against torch and by hand; step times that scale with the hardware."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import block_matrices, layer_flops, training_flops_per_position
from megatron_patch.model.gpt import GPTModel
from megatron_patch.planning.hardware import DEVICES, Hardware, load_hardware
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import rank_parameters
from megatron_patch.planning.timing import attention_imbalance, bubble_share, executed_flops, step_time
from megatron_patch.planning.traffic import traffic
from megatron_patch.stages import Stage
from tests.model.shapes import FAMILIES, LLAMA

ROOT = Path(__file__).parent.parent.parent
STAGE = Stage("patch", 4, positions=64, micro_batch_size=2, global_batch_size=32, steps=3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_executed_products_are_those_that_torch_counts(name, recompute):
    shape = FAMILIES[name]
    model = GPTModel(shape, recompute)
    ids = torch.randint(0, shape.vocab_size, (2, 8, 4))
    # torch's counter omits the fused attention kernel of a CPU and counts only the other products.
    with FlopCounterMode(display=False) as counter:
        model(ids, ids)[0].backward()
    products, attention = executed_flops(shape, Layout(1, recompute=recompute), range(shape.num_layers + 2), 8)
    # Capped scores are computed by plain products.
    assert counter.get_total_flops() == 2 * 8 * (products + (attention if shape.attention_softcap else 0))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_attention_is_executed_once_more_where_it_is_recomputed(recompute):
    shape, ids = LLAMA, torch.randint(0, LLAMA.vocab_size, (2, 8, 1))
    counts = {}
    for kind in ("none", recompute):
        # With plain products, which torch counts over all T positions; the formula counts the (T + 1) / 2 of a causal mask.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            GPTModel(shape, kind)(ids, ids)[0].backward()
        counts[kind] = counter.get_total_flops()
    layers = range(shape.num_layers + 2)
    once, again = (executed_flops(shape, Layout(1, recompute=kind), layers, 8) for kind in ("none", recompute))
    # With plain products torch recomputes only the scores if nothing after them is needed; a fused kernel recomputes everything.
    share = 0.5 if recompute == "selective" else 1.0
    assert counts[recompute] - counts["none"] == 2 * 8 * (again[0] - once[0] + share * (again[1] - once[1]) * 8 / 4.5)


@pytest.mark.parametrize("shape", [LLAMA, dataclasses.replace(LLAMA, window=3, full_layers=(1,))], ids=["full", "window"])
def test_layers_sum_to_the_model(shape):
    assert 3 * sum(layer_flops(shape, 8)) == training_flops_per_position(shape, 8)
    layout = Layout(4, pipeline=3)
    whole = executed_flops(shape, layout, range(4), 8)
    parts = [executed_flops(shape, layout, layers, 8) for layers in layout.layers_by_pipeline_rank(shape)]
    assert tuple(map(sum, zip(*parts, strict=True))) == whole
    assert whole[1] == 3.5 * (
        layer_flops(shape, 8)[1] + layer_flops(shape, 8)[2] - 2 * (block_matrices(shape, 0) + block_matrices(shape, 1))
    )


def test_traffic_by_hand():
    layout = Layout(32, tensor=2, pipeline=2, sequence_parallel=True, precision="bf16")
    shape = dataclasses.replace(LLAMA, num_layers=6)
    first, last = layout.layers_by_pipeline_rank(shape)
    rows = {row.kind: row for row in traffic(shape, layout, first, STAGE, DEVICES["H100"])}
    hidden, micro_batches = 2 * 2 * 64 * 24, 2
    blocks = len(first) - 1
    assert rows["tensor"].bytes == micro_batches * (4 * blocks + 1) * hidden and rows["tensor"].link == "node"
    assert rows["pipeline"].bytes == micro_batches * hidden / 2 and rows["pipeline"].link == "network"
    # ZeRO 1: float32 gradients are all-reduced, and the new bfloat16 weights gathered.
    assert rows["data"].bytes == pytest.approx((2 * 4 + 2) * 7 / 8 * rank_parameters(shape, layout, first))
    assert rows["data"].link == "network"
    rounded = traffic(shape, dataclasses.replace(layout, communication_bytes=2), first, STAGE, DEVICES["H100"])
    assert rounded[-1].bytes == pytest.approx((2 * 2 + 2) * 7 / 8 * rank_parameters(shape, layout, first))
    # The loss: 2 + K float32 numbers a position.
    ends = {row.kind: row for row in traffic(shape, layout, last, STAGE, DEVICES["H100"])}
    assert ends["tensor"].bytes == micro_batches * ((4 * (len(last) - 1) + 1) * hidden + 4 * 6 * 2 * 64)
    assert traffic(shape, Layout(1), range(8), STAGE, DEVICES["H100"]) == []


@pytest.mark.parametrize(("recompute", "repeated"), [("none", 0), ("selective", 0), ("full", 8 + 4 + 4 + 8)])
def test_traffic_of_context_parallelism_by_hand(recompute, repeated):
    """8 query heads and 1 key head of a rank over 4 ranks: the key head is sent four times, so that each rank gets one."""
    shape = dataclasses.replace(FAMILIES["llama"], num_layers=3, num_attention_heads=16, num_query_groups=2, head_size=8)
    stage = Stage("s", 1, 1024, 2, 16, 1, context_parallel_size=4)
    layout = Layout(ranks=16, tensor=2, recompute=recompute, context=(4,))
    # 2 groups of 4 ranks read 16 samples: 4 micro-batches of 2. Values of 2 bytes in forward and backward; 3/4 leave the rank.
    heads = 2 * (8 + 8 + 4 + 4) + repeated
    sent = 3 / 4 * 4 * 3 * 2 * (1024 // 4) * heads * 8 * 2
    rows = [row for row in traffic(shape, layout, range(5), stage, DEVICES["H100"]) if row.kind == "context"]
    assert [(row.link, row.bytes) for row in rows] == [("node", sent)]
    # In nodes of 4 devices, 2 of the 4 ranks are in the same node.
    rows = [
        row
        for row in traffic(shape, layout, range(5), stage, dataclasses.replace(DEVICES["H100"], node_devices=4))
        if row.kind == "context"
    ]
    assert [(row.link, row.bytes) for row in rows] == [("node", sent / 3), ("network", sent * 2 / 3)]


def test_ranks_that_share_samples_compute_as_much_as_ranks_that_do_not():
    shape = FAMILIES["llama"]
    alone = Stage("s", 1, 4096, 1, 8, 1)
    shared = dataclasses.replace(alone, context_parallel_size=4)
    one, other = (step_time(shape, Layout(ranks=8), stage, DEVICES["H100"]) for stage in (alone, shared))
    assert (one.context, other.context > 0) == (0, True)
    # The whole sample's norms and products pass through memory; attention saves its output in two forms.
    assert one.compute <= other.compute < 1.1 * one.compute


@pytest.mark.parametrize(("window", "full"), [(None, ()), (24, ()), (24, (1,)), (100, ())])
def test_the_last_of_ranks_that_gather_keys_sets_the_pace_of_attention(window, full):
    shape = dataclasses.replace(FAMILIES["llama"], num_layers=3, window=window, full_layers=full)
    stage, layers = Stage("s", 1, 96, 1, 8, 1, context_parallel_size=4), range(1, 4)
    query, key = torch.arange(96)[:, None], torch.arange(96)
    scores = torch.zeros(4)
    for block in range(3):
        width = 96 if shape.window_of(block) is None else shape.window_of(block)
        scores += ((key <= query) & (key > query - width)).sum(dim=1).view(4, 24).sum(dim=1)
    found = attention_imbalance(shape, Layout(8, context_exchange="all_gather"), layers, stage)
    assert found == pytest.approx(float(scores.max() / scores.mean()))
    assert attention_imbalance(shape, Layout(8, context_exchange="a2a"), layers, stage) == 1
    capped = dataclasses.replace(shape, attention_softcap=30.0)  # plain products of all scores
    assert attention_imbalance(capped, Layout(8, context_exchange="all_gather"), layers, stage) == 1
    times = {kind: step_time(shape, Layout(8, context_exchange=kind), stage, DEVICES["H100"]) for kind in ("a2a", "all_gather")}
    assert (times["all_gather"].compute > times["a2a"].compute) == (found > 1)


def test_the_bubble_is_that_of_the_schedule():
    assert bubble_share(Layout(4, pipeline=4), STAGE) == 3 / (16 + 3)
    time = step_time(dataclasses.replace(LLAMA, num_layers=7), Layout(4, pipeline=4), STAGE, DEVICES["H100"])
    assert time.bubble == pytest.approx(3 / 16 * (time.compute + time.tensor + time.pipeline))


def test_a_device_twice_as_fast_halves_the_compute_time():
    slow = DEVICES["A100"]
    fast = dataclasses.replace(slow, peak_tflops=2 * slow.peak_tflops, memory_gb_per_second=2 * slow.memory_gb_per_second)
    one, two = (step_time(LLAMA, Layout(8), STAGE, device) for device in (slow, fast))
    assert two.compute == pytest.approx(one.compute / 2) and two.data <= one.data * 2
    assert one.mfu == pytest.approx(STAGE.positions_per_step * training_flops_per_position(LLAMA, 64) / (one.total * 8 * 312e12))


def test_measured_ceilings_replace_the_table(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"matmul_efficiency": 0.71, "dollars_per_hour": 1.9}))
    mine = load_hardware("h100", path)
    assert (mine.matmul_efficiency, mine.dollars_per_hour, mine.peak_tflops) == (0.71, 1.9, 989.4)
    for text, words in (
        ('{"matmul": 1}', "unknown key 'matmul'"),
        ("[1]", "holds a list"),
        ('{"overlap": -1}', "overlap is -1"),
        ('{"matmul_efficiency": 71}', "matmul_efficiency is 71, but it is a share"),
        ('{"memory_passes": -1}', "memory_passes is -1"),
        ('{"memory_gib": 2}', r"memory_gib is 2, of which 2.5 \(reserved_gib\) cannot be used"),
        ("{", "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_hardware("H100", path)
    with pytest.raises(ConfigError, match="A100, H100, H200, B200"):
        load_hardware("abacus")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("layouts-*.json")), ids=lambda path: path.stem)
def test_recorded_steps_took_about_as_long_as_planned(path, tmp_path, monkeypatch):
    """Plans from the measured speed of products, attention and copies; links between ranks were not measured."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import layouts

    recorded = json.loads(path.read_text())
    alone = [row for row in recorded["rows"] if row["ranks"] == 1]
    assert alone
    flags = layouts.plan_flags(argparse.Namespace(**recorded["settings"]), 1, tmp_path)
    for row in alone:
        words = [*flags, *layouts.layout_flags("" if row["layout"] == "one rank" else row["layout"])]
        planned = layouts.planned_seconds(*layouts.resolved(words, 1), Hardware(**recorded["hardware"]))
        for stage, seconds in planned.items():
            assert 0.7 < seconds / row[stage]["step_seconds"] < 1.3, (stage, row)
