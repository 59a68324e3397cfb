"""The traffic of one step of two ranks, counted for each collective: of tensor parallelism, and of data parallelism at each ZeRO level.

In a ring of p ranks, each rank sends n·(p-1)/p numbers for a gather or a reduce-scatter of n numbers in total, and twice as many for an
all-reduce.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_patch.config.resolve import load_config
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from megatron_patch.parallel.tensor import TensorParallel
from megatron_patch.planning.hardware import DEVICES
from megatron_patch.planning.layout import Layout, layout_of
from megatron_patch.planning.traffic import traffic as planned_traffic
from megatron_patch.stages import Stage
from megatron_patch.training.pretrain import make_engine_config
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command, start_program, train
from tests.model.shapes import LLAMA, OLMO2

SHAPE = dataclasses.replace(LLAMA, vocab_size=64, padded_vocab_size=64, num_layers=2)
BATCH, RANKS = 2, 2
HIDDEN = SHAPE.hidden_size


def count_traffic(function):
    """Returns what this rank sends while the function runs: [(collective, number of values)]."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    share = (RANKS - 1) / RANKS
    factor = {"all_reduce": 2, "all_gather_into_tensor": RANKS, "reduce_scatter_tensor": 1}
    found = []
    for event in profiler.events():
        library, _, kind = event.name.partition("::")
        if library == "c10d" and "coalesced" not in kind:
            assert kind in ("allreduce_", "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"), f"{kind} is not counted"
        if library == "_c10d_functional" and kind in factor:
            found.append((kind, int(factor[kind] * math.prod(event.input_shapes[0]) * share)))
    return found


def on_a_rank(patch_size, positions, sequence, shape=SHAPE, recompute="none"):
    dist.init_process_group("gloo")
    parallel = TensorParallel(dist.get_rank(), RANKS, dist.group.WORLD, sequence)
    model = GPTModel(shape, recompute, parallel=parallel)
    initialize(model, shape, seed=1, rank=parallel.rank, size=RANKS)
    ids = torch.arange(BATCH * positions * patch_size).remainder(64).view(BATCH, positions, patch_size)
    embedding = count_traffic(lambda: model.embedding(ids))
    hidden = torch.randn(BATCH, positions // RANKS if sequence else positions, HIDDEN)
    head = count_traffic(lambda: model.head(hidden, None, ids, None))
    step = count_traffic(lambda: model(ids, ids)[0].backward())
    return {"embedding": embedding, "head": head, "step": step}


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    """Traffic by (K, positions, sequence parallelism): 64 tokens as 64 positions or as 16 patches of 4, and 64 patches of 4."""
    found = {}
    for key in [(1, 64, False), (4, 16, False), (4, 64, False), (1, 64, True), (4, 16, True), (4, 64, True)]:
        first, second = run_ranks(on_a_rank, RANKS, tmp_path_factory.mktemp("logs"), *key)
        assert first == second
        found[key] = first
    return found


def total(calls):
    return sum(numbers for _, numbers in calls)


def test_patches_divide_the_embedding_s_traffic_per_token_by_k(traffic):
    for sequence in (False, True):
        token, patch = traffic[1, 64, sequence]["embedding"], traffic[4, 16, sequence]["embedding"]
        assert len(token) == len(patch) == 1, "one collective, after the mean over the patch"
        assert total(token) == 4 * total(patch) > 0
        # With constant positions, as in the papers, a step reads K times as many tokens for the same traffic.
        assert total(traffic[4, 64, sequence]["embedding"]) == total(token)


def test_the_loss_exchanges_two_plus_k_numbers_per_patch(traffic):
    for patch_size, positions in ((1, 64), (4, 16), (4, 64)):
        calls = traffic[patch_size, positions, False]["head"]
        assert calls == [("all_gather_into_tensor", (2 + patch_size) * BATCH * positions * (RANKS - 1))]


def test_sequence_parallelism_does_not_increase_the_traffic(traffic):
    for patch_size, positions in ((1, 64), (4, 16)):
        plain, sharded = (traffic[patch_size, positions, sequence]["step"] for sequence in (False, True))
        # Each rank applies the weights of the norms to some positions only, so their gradients are summed: H numbers per norm.
        norms = 2 * HIDDEN * (2 * SHAPE.num_layers + 1) * (RANKS - 1) / RANKS
        assert total(sharded) - norms <= total(plain)
        assert all(kind != "all_reduce" or numbers <= 2 * HIDDEN for kind, numbers in sharded), "positions are gathered and scattered"


def test_the_traffic_of_a_step_matches_the_formula(traffic):
    """All-reduces: each half of a block once forward and once backward, the embedding once forward, the head once backward."""
    for patch_size, positions in ((1, 64), (4, 16), (4, 64)):
        activations = BATCH * positions * HIDDEN
        loss = (2 + patch_size) * BATCH * positions * (RANKS - 1)
        sums = 4 * SHAPE.num_layers + 2
        assert total(traffic[patch_size, positions, False]["step"]) == sums * 2 * activations * (RANKS - 1) // RANKS + loss


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_norms_over_all_heads_exchange_one_number_per_position(tmp_path, recompute):
    """For queries and for keys, in each pass. Full recomputation repeats both halves of a block whose outputs are normalized."""
    shape = dataclasses.replace(OLMO2, vocab_size=64, padded_vocab_size=64)
    (found, same) = run_ranks(on_a_rank, RANKS, tmp_path, 4, 16, False, shape, recompute)
    layout = Layout(RANKS, tensor=RANKS, recompute=recompute, precision="fp32")
    stage = Stage("s", 4, positions=16, micro_batch_size=BATCH, global_batch_size=BATCH, steps=1)
    (planned,) = planned_traffic(shape, layout, range(shape.num_layers + 2), stage, DEVICES["H100"])
    passes = 3 if recompute == "full" else 2
    squares = [numbers for _, numbers in found["step"] if numbers == BATCH * 16]
    assert len(squares) == 2 * passes * shape.num_layers
    # The plan counts the exchange of the loss as an all-reduce; here each rank gathers what the other has.
    assert found == same and 4 * total(found["step"]) == pytest.approx(planned.bytes, rel=1e-12)


def count_the_last_step(argv):
    """Runs the program on a rank and writes the bytes that its last step sends to the other rank into `SAVE/traffic.json`.

    In its first step, ZeRO 3 also exchanges the order of the modules.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_patch.engine.data_parallel import DataParallelEngine

    share, sent = (RANKS - 1) / RANKS, []
    # The first argument of each collective is its result: of a gather the whole, of a scatter this rank's share.
    factors = {"c10d::allreduce_": 2, "c10d::_allgather_base_": 1, "c10d::_reduce_scatter_base_": RANKS, "c10d::broadcast_": RANKS}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "c10d" and operator.name() != "c10d::barrier":
                tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                sent.extend(factors[operator.name()] * share * tensor.nbytes for tensor in tensors)
            return operator(*args, **(kwargs or {}))

    step = DataParallelEngine.train_step

    def counted_step(self, *args):
        sent.clear()
        with Counter():
            return step(self, *args)

    DataParallelEngine.train_step = counted_step
    code = start_program(argv)
    (Path(argv[argv.index("--save") + 1]) / "traffic.json").write_text(json.dumps(sum(sent)))
    return code


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_parallelism_sends_the_planned_bytes(tmp_path, corpus, zero):
    settings = tmp_path / "ds.json"
    # So that ZeRO 3 does what it does with a large model: it keeps no weights gathered from the forward to the backward pass.
    small = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    settings.write_text(json.dumps({"zero_optimization": small}))
    plan = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 1 --train-tokens 576 --lr 3e-3 --bf16"
    words = command(plan, f"--zero-stage {zero} --deepspeed_config {settings}")
    run = train(tmp_path / "run", RANKS, words, "--data-path", corpus, main=count_the_last_step)
    config = load_config([*MODEL, *DATA, *words, "--dry-run", "--world-size", str(RANKS)], 1)
    layout = layout_of(config, make_engine_config(config))
    (layers,) = layout.layers_by_pipeline_rank(config.shape)
    (planned,) = planned_traffic(config.shape, layout, layers, config.plan.stages[0], DEVICES["H100"])
    sent = json.loads((run.folder / "traffic.json").read_text())
    assert sent == pytest.approx(planned.bytes, rel=0.01), "loss and gradient norm are some bytes more"


def count_the_exchange_of_experts(argv):
    """Runs the program on a rank and writes the bytes that the exchange of its last step sends to the other rank into a file of SAVE."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_patch.engine.data_parallel import DataParallelEngine

    step, sent = DataParallelEngine.train_step, []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.name() == "c10d::alltoall_base_":
                rows, rank = args[1], dist.get_rank()
                parts = rows.split(args[4] or len(rows) // RANKS)
                sent.extend(part.nbytes for to, part in enumerate(parts) if to != rank)
            return operator(*args, **(kwargs or {}))

    def counted_step(self, *given):
        sent.clear()
        with Counter():
            return step(self, *given)

    DataParallelEngine.train_step = counted_step
    code = start_program(argv)
    (Path(argv[argv.index("--save") + 1]) / f"exchange-{os.environ['RANK']}.json").write_text(json.dumps(sum(sent)))
    return code


def test_the_exchange_of_experts_sends_the_planned_bytes(tmp_path, corpus):
    """Each position uses all experts, so that the load is even."""
    plan = "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --patch-size 4 --train-tokens 4K --lr 3e-3"
    plan += " --num-layers 3 --num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 16 --moe-layer-freq [0,1,1] --bf16"
    words = command(plan, "--expert-model-parallel-size 2 --recompute-granularity full --exit-interval 1")
    run = train(tmp_path / "run", RANKS, words, "--data-path", corpus, main=count_the_exchange_of_experts)
    config = load_config([*command(MODEL, DATA, words), "--data-path", corpus], RANKS)
    layout = layout_of(config, make_engine_config(config))
    rows = planned_traffic(config.shape, layout, range(config.shape.num_layers + 2), config.plan.stages[0], DEVICES["H100"])
    (planned,) = (row.bytes for row in rows if row.kind == "experts")
    for rank in range(RANKS):
        assert json.loads((run.folder / f"exchange-{rank}.json").read_text()) == planned
