"""The part of each parameter that a tensor-parallel rank holds, by the parameter's name (no torch).

In: a parameter's name, the model's shape, the tensor-parallel size. Out: the dimension along which the parameter is sharded, or None for a
parameter that every rank holds in full. The terms are Megatron-LM's (arXiv 1909.08053). In a linear layer y = x Wᵀ, W [outputs, inputs],
"column-parallel" means that each rank computes some of the outputs (rows of W), and "row-parallel" that each rank reads some of the inputs
(columns of W).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.utils.units import plural

COLUMN_PARALLEL = (
    *("attention.query.weight", "attention.query.bias"),
    *("feed_forward.gate.weight", "feed_forward.gate.bias", "feed_forward.up.weight", "feed_forward.up.bias"),
    *("feed_forward.shared.gate.weight", "feed_forward.shared.up.weight"),
)
"""Ends of the names of column-parallel parameters; the projections to keys and values are too, if `shards_key_value`."""
ROW_PARALLEL = ("attention.output.weight", "feed_forward.down.weight", "feed_forward.shared.down.weight")
"""Ends of the names of row-parallel parameters; every rank holds the full bias of a row-parallel layer."""
_EXPERTS = ("feed_forward.experts.gate.weight", "feed_forward.experts.up.weight", "feed_forward.experts.down.weight")
"""Ends of the names of parameters with one matrix for each expert, [experts, outputs, inputs]; a rank holds some of the experts."""
VOCABULARY_PARAMETERS = ("embedding.word.weight", "head.weight")
"""Names of the parameters with one row for each token id; a rank holds a vocabulary shard of them."""
_ALL_HEADS_NORMS = ("attention.query_norm.weight", "attention.key_norm.weight")
"""Ends of the names of norms over all heads, which are sharded with the heads; the second one if `shards_key_value`."""
_KEY_VALUE = ("attention.key.weight", "attention.key.bias", "attention.value.weight", "attention.value.bias")


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter holds one matrix for each expert, [experts, outputs, inputs]."""
    return name.endswith(_EXPERTS)


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter.

    Args:
        dim: the dimension along which the parameter is split into equal parts.
        index: index of this rank's part.
        count: number of parts.
    """

    dim: int
    index: int
    count: int

    def full_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the full parameter, from that of a part."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(local))


def shards_key_value(shape: ModelShape, size: int) -> bool:
    """Whether the projections to keys and values are sharded; with fewer query groups than ranks, every rank holds them in full."""
    return shape.num_query_groups % size == 0


def heads_of_rank(shape: ModelShape, tensor: int) -> tuple[int, int]:
    """Returns the query heads and the key-value heads that attention of a tensor-parallel rank computes with.

    A rank with all key-value heads, because there are fewer than ranks, selects the one that its queries attend to.
    """
    return shape.num_attention_heads // tensor, max(1, shape.num_query_groups // tensor)


def divides_heads(shape: ModelShape, tensor: int, size: int) -> bool:
    """Whether context-parallel ranks can share the heads of a tensor-parallel rank: all get as many queries, and the keys of these.

    Args:
        shape: the model's shape.
        tensor: the tensor-parallel size.
        size: the context-parallel size.
    """
    heads, groups = heads_of_rank(shape, tensor)
    return heads % size == 0 and (groups % size == 0 or size % groups == 0)


def gathers_keys(shape: ModelShape, tensor: int, size: int, comm_type: str | None) -> bool:
    """Whether context-parallel ranks gather keys and values of all positions, in place of exchanging heads for positions.

    Args:
        shape: the model's shape.
        tensor: the tensor-parallel size.
        size: the context-parallel size.
        comm_type: --cp-comm-type; None: they gather only where they cannot share the heads.
    """
    if size == 1:
        return False
    return not divides_heads(shape, tensor, size) if comm_type is None else comm_type == "all_gather"


def shard_of(name: str, shape: ModelShape, rank: int, size: int) -> Shard | None:
    """Returns the part of a parameter that a tensor-parallel rank holds, or None for the full parameter.

    Args:
        name: the parameter's name in the model.
        shape: the model's shape.
        rank: the tensor-parallel rank.
        size: number of tensor-parallel ranks.
    """
    if size == 1:
        return None
    if name.endswith(COLUMN_PARALLEL + VOCABULARY_PARAMETERS + _EXPERTS) or (name.endswith(_KEY_VALUE) and shards_key_value(shape, size)):
        return Shard(0, rank, size)
    if shape.qk_norm_scope == "all":
        norms = _ALL_HEADS_NORMS if shards_key_value(shape, size) else _ALL_HEADS_NORMS[:1]
        if name.endswith(norms):
            return Shard(0, rank, size)
    return Shard(1, rank, size) if name.endswith(ROW_PARALLEL) else None


def expert_shard(tensor_rank: int, tensor_size: int, expert_rank: int, expert_size: int) -> Shard | None:
    """Returns the part of a parameter of experts that a rank holds: a part of those of its tensor-parallel rank; None for all experts."""
    count = tensor_size * expert_size
    return None if count == 1 else Shard(0, tensor_rank * expert_size + expert_rank, count)


def check_sharding(shape: ModelShape, size: int, expert_size: int = 1) -> None:
    """Checks that tensor-parallel ranks divide a model, and data-parallel ranks its experts.

    Raises:
        ConfigError: they do not; the error names the flag.
    """
    experts, sizes = shape.experts, {"--num-attention-heads": shape.num_attention_heads}
    if experts is None or experts.dense_layers:
        sizes["--ffn-hidden-size"] = shape.ffn_hidden_size
    if experts is not None:
        sizes |= {"--num-experts": experts.count, "--moe-shared-expert-intermediate-size": experts.shared_ffn_hidden_size}
    sizes["the padded vocabulary size"] = shape.padded_vocab_size
    for flag, value in sizes.items():
        if value % size:
            raise ConfigError(
                f"{flag} {value} does not divide into {size} tensor-parallel ranks", f"multiples of {size}", "change one of the two"
            )
    if experts is not None and experts.count % (size * expert_size):
        raise ConfigError(
            f"--num-experts {experts.count} with --expert-model-parallel-size {expert_size} and {plural(size, 'tensor-parallel rank')}",
            f"a multiple of {size * expert_size} experts",
            "change one of the three",
        )
    groups = shape.num_query_groups
    if groups % size and size % groups:
        raise ConfigError(
            f"--num-query-groups {groups} does not divide into {size} tensor-parallel ranks",
            "a multiple or a divisor of the number of ranks",
            "change one of the two",
        )
