"""The names and shapes of all parameters of the model (no torch), for plans and parameter counts.

In: the model's shape. Out: names with shapes, layer by layer, as `GPTModel` has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import is_expert_parameter, shard_of

ParameterShapes = dict[str, tuple[int, ...]]
"""Parameter name -> shape."""


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is a weight matrix inside of a block, or one for each expert: not an embedding, the head, a norm or a bias.

    Args:
        name: the parameter's name in the model.
        dimensions: its number of dimensions.
    """
    return dimensions >= 2 and name.startswith("blocks.")


def _norm(name: str, shape: ModelShape) -> ParameterShapes:
    weights: ParameterShapes = {f"{name}.weight": (shape.hidden_size,)}
    return weights | ({f"{name}.bias": (shape.hidden_size,)} if shape.normalization == "LayerNorm" else {})


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> ParameterShapes:
    weight: ParameterShapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def _feed_forward(name: str, inner: int, shape: ModelShape) -> ParameterShapes:
    hidden, bias = shape.hidden_size, shape.mlp_bias
    gate = _linear(f"{name}.gate", hidden, inner, bias) if shape.gated else {}
    return gate | _linear(f"{name}.up", hidden, inner, bias) | _linear(f"{name}.down", inner, hidden, bias)


def _experts(name: str, shape: ModelShape, experts: ExpertShape) -> ParameterShapes:
    hidden, count, inner = shape.hidden_size, experts.count, experts.ffn_hidden_size
    found = _linear(f"{name}.router", hidden, count, False)
    found |= {f"{name}.experts.{part}.weight": (count, inner, hidden) for part in ("gate", "up")}
    found[f"{name}.experts.down.weight"] = (count, hidden, inner)
    return found | (_feed_forward(f"{name}.shared", experts.shared_ffn_hidden_size, shape) if experts.shared_ffn_hidden_size else {})


def block_parameters(shape: ModelShape, number: int) -> Mapping[str, tuple[int, ...]]:
    """Returns name (within the block) -> shape of the parameters of one block, numbered from 0."""
    return _block_parameters(shape, shape.experts_of(number))


@functools.lru_cache(maxsize=256)  # a search asks for the same blocks many times
def _block_parameters(shape: ModelShape, experts: ExpertShape | None) -> Mapping[str, tuple[int, ...]]:
    hidden = shape.hidden_size
    queries, keys = shape.num_attention_heads * shape.head_size, shape.num_query_groups * shape.head_size
    found = _norm("attention_norm", shape) if shape.norms_before else {}
    for name, outputs in (("query", queries), ("key", keys), ("value", keys)):
        found |= _linear(f"attention.{name}", hidden, outputs, shape.qkv_bias)
    found |= _linear("attention.output", queries, hidden, shape.attention_bias)
    if shape.qk_norm:
        whole = shape.qk_norm_scope == "all"
        found |= {
            f"attention.{name}_norm.weight": (width if whole else shape.head_size,) for name, width in (("query", queries), ("key", keys))
        }
    if shape.norms_after:
        found |= _norm("attention_output_norm", shape)
    if shape.norms_before:
        found |= _norm("feed_forward_norm", shape)
    if experts is not None:
        found |= _experts("feed_forward", shape, experts)
    else:
        found |= _feed_forward("feed_forward", shape.ffn_hidden_size, shape)
    return MappingProxyType(found | (_norm("feed_forward_output_norm", shape) if shape.norms_after else {}))


def parameters_of_layers(shape: ModelShape, layers: range | None = None, vocabulary_rows: int | None = None) -> ParameterShapes:
    """Returns name -> shape of the parameters of some layers.

    Args:
        shape: the model's shape.
        layers: indices: 0 is the embedding, 1 to L are the blocks, L + 1 is the final norm and head; None: all. With a tied head, a range
            with L + 1 but without 0 includes a copy of the embedding weight.
        vocabulary_rows: number of rows of embedding and head; None: the size of the padded vocabulary.
    """
    layers = range(shape.num_layers + 2) if layers is None else layers
    first, last = 0 in layers, shape.num_layers + 1 in layers
    rows = shape.padded_vocab_size if vocabulary_rows is None else vocabulary_rows
    found: ParameterShapes = {}
    if first or (last and shape.tie_embeddings):
        found["embedding.word.weight"] = (rows, shape.hidden_size)
    if first and shape.position_embedding == "learned":
        found["embedding.position.weight"] = (shape.max_positions, shape.hidden_size)
    for layer in layers:
        if 1 <= layer <= shape.num_layers:
            found |= {f"blocks.{layer - 1}.{name}": size for name, size in block_parameters(shape, layer - 1).items()}
    if last:
        found |= _norm("final_norm", shape)
        if not shape.tie_embeddings:
            found["head.weight"] = (rows, shape.hidden_size)
    return found


def used_numel(name: str, size: tuple[int, ...], shape: ModelShape) -> int:
    """Returns the number of elements of a parameter that one position uses: of experts, those of the ones that it chooses."""
    numel = math.prod(size)
    if shape.experts is None or not is_expert_parameter(name):
        return numel
    return numel // shape.experts.count * shape.experts.top_k


def shard_numel(name: str, size: tuple[int, ...], shape: ModelShape, tensor_parallel_size: int) -> int:
    """Returns the number of elements of a parameter on each of the tensor-parallel ranks."""
    shard = shard_of(name, shape, 0, tensor_parallel_size)
    return math.prod(size) // (shard.count if shard is not None else 1)
