"""Muon on real ranks that hold parts of matrices, against the formula on full matrices in float64."""

import dataclasses
import math

import pytest
import torch

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.model.sharding import Shard
from megatron_patch.optimizers.groups import HIDDEN, LR_SCALE, parameter_groups
from megatron_patch.optimizers.muon import OrthogonalizedMomentum, make_muon, update_scale
from megatron_patch.optimizers.newton_schulz import newton_schulz
from megatron_patch.optimizers.ownership import MatrixSpan
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.optimizers.state import ensure_state, make_optimizer, state_kinds, step_count, zero_state
from tests.distributed.ranks import run_ranks

OPTIONS = dataclasses.replace(ScheduleOptions(), optimizer="muon", lr=0.02, weight_decay=0.1)
SHAPES = {"blocks.0.a": (8, 12), "blocks.0.b": (12, 8), "blocks.0.c": (8, 12), "blocks.1.key": (4, 8)}
CUT = {"blocks.0.a": 0, "blocks.0.b": 1}
"""Matrices that tensor-parallel ranks share, and along which dimension."""


def values(name, step):
    """The weights (step 0) or gradients of a full matrix, float64."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(*SHAPES[name], dtype=torch.float64, generator=generator)


def expected(name, steps, options, lr=0.02, momenta=None):
    """A matrix after some steps of the formula, in float64."""
    weight, momentum = values(name, 0), torch.zeros(SHAPES[name], dtype=torch.float64)
    for step in range(1, steps + 1):
        gradient, beta = values(name, step), options.muon_momentum
        momentum = beta * momentum + (1 - beta) * gradient
        update = beta * momentum + (1 - beta) * gradient if options.muon_nesterov else momentum
        update = newton_schulz(update[None], options.muon_coefficient_type, options.muon_num_ns_steps)[0]
        factor = (
            options.muon_extra_scale_factor
            * {
                "spectral": math.sqrt(max(SHAPES[name])),
                "unit_rms_norm": math.sqrt(SHAPES[name][0] / SHAPES[name][1]),
                "shape_scaling": math.sqrt(max(1, SHAPES[name][0] / SHAPES[name][1])),
            }[options.muon_scale_mode]
        )
        weight = (1 - lr * options.weight_decay) * weight - lr * factor * update
    return weight


def shard_of(name, tensor_rank, tensor):
    """This rank's shard of a matrix."""
    return Shard(CUT[name], tensor_rank, tensor) if name in CUT and tensor > 1 else None


def step_on_ranks(kind, tensor, options, dtype, wave_limit):
    """Steps three times on each rank; returns what each rank holds: name -> (shard index, start, values)."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensor_rank, data_rank, data = rank % tensor, rank // tensor, ranks // tensor
    whole, end = {}, 0
    for name in SHAPES:
        shard = shard_of(name, tensor_rank, tensor)
        numel = math.prod(SHAPES[name]) // (1 if shard is None else shard.count)
        whole[name] = (shard, end, numel)
        end += numel

    def flat(step):
        parts = []
        for name, (shard, _, _) in whole.items():
            value = values(name, step)
            parts.append((value if shard is None else value.chunk(shard.count, shard.dim)[shard.index]).reshape(-1))
        return torch.cat(parts).float()

    if kind == "replicated":
        tensors = [part.clone() for part in flat(0).split([numel for _, _, numel in whole.values()])]
        spans = [MatrixSpan(name, SHAPES[name], shard, 0, numel, i, 0) for i, (name, (shard, _, numel)) in enumerate(whole.items())]

        def gradients(step):
            return flat(step).split([numel for _, _, numel in whole.values()])

    else:
        part = -(-end // data)
        first, last = part * data_rank, min(end, part * (data_rank + 1))
        tensors, spans = [flat(0)[first:last].clone()], []
        for name, (shard, begin, numel) in whole.items():
            low, high = max(begin, first), min(begin + numel, last)
            if high > low:
                spans.append(MatrixSpan(name, SHAPES[name], shard, low - begin, high - low, 0, low - first))

        def gradients(step):
            return [flat(step)[first:last]]

    other = torch.ones(3)
    groups = [{"params": tensors, "weight_decay": 0.1, HIDDEN: True}, {"params": [other], "weight_decay": 0.0}]
    optimizer = make_muon(groups, options, offloaded=False)
    optimizer.attach([(tensors, spans)], None, torch.device("cpu"), dtype, wave_limit)
    for step in (1, 2, 3):
        for target, gradient in zip(tensors, gradients(step), strict=True):
            target.grad = gradient.clone()
        other.grad = torch.ones(3)
        optimizer.step()
    assert set(state_kinds(optimizer.state[tensors[0]])) == {"momentum"} and step_count(optimizer) == 3
    assert set(state_kinds(optimizer.state[other])) == {"exp_avg", "exp_avg_sq"} and other.max() < 1 - 0.05
    found = {}
    for span in spans:
        index = 0 if span.shard is None else span.shard.index
        found[span.name] = (index, span.start, tensors[span.tensor][span.offset : span.offset + span.numel].tolist())
    return found, optimizer.exchanges[0].sent_bytes


def full_matrices(results, tensor):
    """Puts the parts of all ranks together; copies must be equal to the last bit."""
    found = {}
    for name, shape in SHAPES.items():
        count = tensor if name in CUT else 1
        shards = torch.full((count, math.prod(shape) // count), float("nan"))
        for held, _ in results:
            if name in held:
                index, start, listed = held[name]
                part = torch.tensor(listed)
                place = shards[index, start : start + len(part)]
                assert torch.equal(place[~place.isnan()], part[~place.isnan()]), f"copies of {name} differ"
                place.copy_(part)
        dim = CUT.get(name, 0)
        local = [size // count if axis == dim else size for axis, size in enumerate(shape)]
        found[name] = torch.cat([shard.view(local) for shard in shards], dim)
    return found


CASES = [
    ("replicated", 1, 1, {}, 1 << 20),
    ("replicated", 2, 2, {"muon_nesterov": False}, 100),
    ("cut", 3, 1, {"muon_scale_mode": "shape_scaling", "muon_coefficient_type": "polar_express"}, 1),
    ("cut", 4, 2, {"muon_scale_mode": "unit_rms_norm", "muon_num_ns_steps": 7, "muon_momentum": 0.8}, 150),
    ("cut", 2, 2, {"muon_extra_scale_factor": 1.0}, 1 << 20),
]


@pytest.mark.parametrize(("kind", "ranks", "tensor", "changes", "wave_limit"), CASES)
def test_steps_equal_the_formula_on_full_matrices(tmp_path, kind, ranks, tensor, changes, wave_limit):
    options = dataclasses.replace(OPTIONS, **changes)
    results = run_ranks(step_on_ranks, ranks, tmp_path, kind, tensor, options, torch.float32, wave_limit)
    for name, found in full_matrices(results, tensor).items():
        torch.testing.assert_close(found.double(), expected(name, 3, options), rtol=0, atol=2e-6)
    assert (sum(sent for _, sent in results) > 0) == (ranks > 1)


def test_bfloat16_matrices_give_equal_copies(tmp_path):
    results = run_ranks(step_on_ranks, 4, tmp_path, "replicated", 2, OPTIONS, torch.bfloat16, 100)
    for name, found in full_matrices(results, 2).items():
        difference = (found.double() - expected(name, 3, OPTIONS)).abs().max()
        assert 1e-5 < difference < 1e-2, f"{name} differs by {difference}, which bfloat16 does not explain"


@pytest.mark.parametrize("mode", ["spectral", "unit_rms_norm", "shape_scaling"])
def test_scales(mode):
    wide, tall = update_scale((4, 16), mode, 0.2), update_scale((16, 4), mode, 0.2)
    assert (wide, tall) == {"spectral": (0.8, 0.8), "unit_rms_norm": (0.1, 0.4), "shape_scaling": (0.2, 0.4)}[mode]


class Tiny(torch.nn.Module):
    """Parameters with the names of a model."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.ModuleDict({"word": torch.nn.Embedding(8, 4), "position": torch.nn.Embedding(6, 4)})
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.final_norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 8, bias=False)


def grouped(changes, optimizer):
    """The names in each group, with its decay and its scale of the learning rate."""
    names = {parameter: name for name, parameter in Tiny().named_parameters()}
    groups = parameter_groups(names, dataclasses.replace(ScheduleOptions(lr=1e-3), **changes), OPTIMIZERS[optimizer])
    return [([names[p] for p in group["params"]], group["weight_decay"], group.get(LR_SCALE, 1.0), HIDDEN in group) for group in groups]


def test_groups_of_adamw_are_matrices_and_vectors():
    matrices, vectors = grouped({}, "adamw")
    assert matrices == (["embedding.word.weight", "embedding.position.weight", "blocks.0.weight", "head.weight"], 0.1, 1.0, False)
    assert vectors == (["blocks.0.bias", "final_norm.weight", "final_norm.bias"], 0.0, 1.0, False)


def test_groups_of_muon_set_the_matrices_of_blocks_apart():
    hidden, matrices, vectors = grouped({}, "muon")
    assert hidden == (["blocks.0.weight"], 0.1, 1.0, True)
    assert matrices[0] == ["embedding.word.weight", "embedding.position.weight", "head.weight"] and len(vectors[0]) == 3


def test_rates_and_decays_by_kind():
    changes = {"muon_lr": 2e-2, "muon_weight_decay": 0.0, "decoupled_lr": 5e-4, "embedding_weight_decay": 0.01}
    hidden, vocabulary, matrices, vectors = grouped(changes, "muon")
    assert hidden[1:] == (0.0, 20.0, True) and vocabulary == (["embedding.word.weight", "head.weight"], 0.01, 0.5, False)
    assert matrices == (["embedding.position.weight"], 0.1, 1.0, False) and vectors[1:] == (0.0, 1.0, False)
    assert [group[0][0] for group in grouped({"decoupled_lr": 5e-4}, "adamw")] == [
        "embedding.word.weight",
        "embedding.position.weight",
        "blocks.0.bias",
    ]


def make_state(_):
    """The state that is made before the first step, on one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    weight, other = torch.ones(12), torch.ones(5)
    groups = [{"params": [weight], "weight_decay": 0.1, HIDDEN: True}, {"params": [other], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, OPTIONS)
    assert isinstance(optimizer, OrthogonalizedMomentum)
    optimizer.attach([([weight], [MatrixSpan("blocks.0.a", (3, 4), None, 0, 12)])], None, torch.device("cpu"), torch.float32)
    made = [(state_kinds(ensure_state(optimizer, tensor)), len(optimizer.state[tensor])) for tensor in (weight, other)]
    weight.grad, other.grad = torch.arange(12.0), torch.ones(5)
    optimizer.step()
    momentum = optimizer.state[weight]["momentum"].clone()
    zero_state(optimizer.state.values())
    zeroed = all(not state[kind].any() for state in optimizer.state.values() for kind in state_kinds(state))
    return made, torch.equal(momentum, torch.zeros(12).lerp_(torch.arange(12.0), 1 - 0.95)), zeroed, step_count(optimizer)


def test_each_parameter_has_its_own_kinds_of_state(tmp_path):
    (found,) = run_ranks(make_state, 1, tmp_path, None)
    assert found == ([(("momentum",), 1), (("exp_avg", "exp_avg_sq"), 3)], True, True, 1)
