"""The names and shapes of all parameters of the model (no torch), for plans and parameter counts.

In: the model's shape. Out: names with shapes, layer by layer, as `GPTModel` has them.
"""

from __future__ import annotations

import math

from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import shard_of

ParameterShapes = dict[str, tuple[int, ...]]
"""Parameter name -> shape."""


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is a weight matrix inside of a block: not an embedding, not the head, not a norm or bias.

    Args:
        name: the parameter's name in the model.
        dimensions: its number of dimensions.
    """
    return dimensions == 2 and name.startswith("blocks.")


def _norm(name: str, shape: ModelShape) -> ParameterShapes:
    weights: ParameterShapes = {f"{name}.weight": (shape.hidden_size,)}
    return weights | ({f"{name}.bias": (shape.hidden_size,)} if shape.normalization == "LayerNorm" else {})


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> ParameterShapes:
    weight: ParameterShapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def block_parameters(shape: ModelShape) -> ParameterShapes:
    """Returns name (within the block) -> shape of the parameters of one block."""
    hidden, inner = shape.hidden_size, shape.ffn_hidden_size
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
    if shape.gated:
        found |= _linear("feed_forward.gate", hidden, inner, shape.mlp_bias)
    found |= _linear("feed_forward.up", hidden, inner, shape.mlp_bias) | _linear("feed_forward.down", inner, hidden, shape.mlp_bias)
    return found | (_norm("feed_forward_output_norm", shape) if shape.norms_after else {})


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
    block = block_parameters(shape)
    for layer in layers:
        if 1 <= layer <= shape.num_layers:
            found |= {f"blocks.{layer - 1}.{name}": size for name, size in block.items()}
    if last:
        found |= _norm("final_norm", shape)
        if not shape.tie_embeddings:
            found["head.weight"] = (rows, shape.hidden_size)
    return found


def shard_numel(name: str, size: tuple[int, ...], shape: ModelShape, tensor_parallel_size: int) -> int:
    """Returns the number of elements of a parameter on each of the tensor-parallel ranks."""
    shard = shard_of(name, shape, 0, tensor_parallel_size)
    return math.prod(size) // (shard.count if shard is not None else 1)
