"""Planned memory against torch: saved tensors to the byte, parameters to the element."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_patch.model.expert_balance import RouterBalance
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.parameters import parameters_of_layers
from megatron_patch.ops.documents_attention import documents_of_samples
from megatron_patch.ops.fused_linear_loss import CHUNK_ROWS
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import LOSS_CHUNK_ROWS, rank_parameters, saved_by_layers
from megatron_patch.stages import ExpertBalance, Stage
from tests.model.shapes import FAMILIES
from tests.ops.documents import documents_of

EXPERTS = {
    "experts": ExpertShape(8, 3, 24),
    "sigmoid experts": ExpertShape(4, 2, 24, shared_ffn_hidden_size=16, score="sigmoid", renormalized=True, scaling=1.5, bias=True),
    "pre-softmax experts": ExpertShape(4, 1, 24, renormalized=False, dense_layers=(0,)),
}
SHAPES = {
    **FAMILIES,
    "window": dataclasses.replace(FAMILIES["llama"], window=3, full_layers=(1,)),
    **{name: dataclasses.replace(FAMILIES["llama"], experts=experts) for name, experts in EXPERTS.items()},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def part(shape, parallel=UNSHARDED, layers=None, recompute="none"):
    with torch.device("meta"):
        return GPTModel(shape, recompute, parallel=parallel, layers=layers)


@pytest.mark.parametrize("name", [*FAMILIES, *EXPERTS])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_parameters_of_each_rank_equal_those_that_torch_counts(name, tensor, pipeline):
    shape = SHAPES[name]
    if tensor > shape.num_query_groups and tensor % shape.num_query_groups:
        pytest.skip("does not divide")
    layout = Layout(ranks=tensor * pipeline, tensor=tensor, pipeline=pipeline)
    for layers in layout.layers_by_pipeline_rank(shape):
        model = part(shape, TensorParallel(0, tensor), layers)
        assert rank_parameters(shape, layout, layers) == sum(p.numel() for p in model.parameters())
        whole = {n: p.shape for n, p in part(shape, layers=layers).named_parameters()}
        assert {n: torch.Size(size) for n, size in parameters_of_layers(shape, layers).items()} == whole


def saved_bytes(model, inputs, labels, **more):
    """Returns the bytes of all storages that autograd saves in a forward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(inputs, labels, **more)
    del kept
    return sum(found.values())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("separated", [False, True], ids=["", "documents"])
def test_activations_are_what_autograd_saves_to_the_byte(name, precision, recompute, k, separated):
    """Separated documents, and samples with a window, add their bounds, once for all blocks, which the plan does not count."""
    shape = SHAPES[name]
    balance = ExpertBalance(aux_loss_coeff=0.01 if name == "experts" else 0.0)
    stage = Stage("s", k, positions=8, micro_batch_size=2, global_batch_size=2, steps=1, expert_balance=balance)
    layout = Layout(ranks=1, precision=precision, recompute=recompute)
    model = GPTModel(shape, recompute).to(DTYPES[precision])
    for module in model.modules():
        if isinstance(module, RouterBalance):
            module.adds_gradient = balance.aux_loss_coeff > 0
    ids = torch.randint(0, shape.vocab_size, (2, 8, k))
    layers = range(shape.num_layers + 2)
    # The loss saves the float32 gradient of the head's weight, which `loss_bytes` counts.
    loss = 4 * shape.vocab_size * shape.hidden_size
    # LayerNorm saves two statistics per position, with 16 bits on a CPU and 32 on a GPU.
    narrower = (2 * shape.num_layers + 1) * 16 * 4 if (shape.normalization, precision) == ("LayerNorm", "bf16") else 0
    documents = documents_of([[3, 5], [1, 7]]) if separated else None
    known = documents or (documents_of_samples(2, 8, torch.device("cpu")) if shape.window else None)
    if shape.attention_softcap:
        assert saved_bytes(model, ids, ids, documents=documents) == saved_by_layers(shape, layout, layers, stage) + loss + (
            8 * 8 if separated and recompute == "none" else 0
        ), "each sample with documents has a mask of its own"
        return
    bounds = known.bounds.nbytes + known.longest.nbytes if known is not None and recompute == "none" else 0
    assert saved_bytes(model, ids, ids, documents=documents) == saved_by_layers(shape, layout, layers, stage) + loss - narrower + bounds


def test_the_chunk_of_logits_is_that_of_the_operator():
    assert LOSS_CHUNK_ROWS == CHUNK_ROWS
    assert dataclasses.replace(Layout(ranks=8, tensor=2, pipeline=2)).data == 2
