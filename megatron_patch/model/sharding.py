"""Which part of each parameter a tensor-parallel rank holds, by the parameter's name. No torch: plans and conversions ask too.

In: a parameter's name, the model's shape, how many ranks share each layer. Out: the dimension that is cut, or None for a parameter that
every rank holds whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape

COLUMN_PARALLEL: tuple[str, ...] = ("attention.query.weight", "attention.query.bias", "feed_forward.gate.weight", "feed_forward.gate.bias")
VOCABULARY_PARAMETERS = ("embedding.word.weight", "head.weight")
"""A row for each id, and padding."""
COLUMN_PARALLEL += ("feed_forward.up.weight", "feed_forward.up.bias", *VOCABULARY_PARAMETERS)
ROW_PARALLEL = ("attention.output.weight", "feed_forward.down.weight")
_KEY_VALUE = ("attention.key.weight", "attention.key.bias", "attention.value.weight", "attention.value.bias")


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter.

    Args:
        dim: the dimension that is cut into equal parts.
        index: which part.
        count: of how many.
    """

    dim: int
    index: int
    count: int

    def whole_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(local))


def shards_key_value(shape: ModelShape, size: int) -> bool:
    """Whether keys and values are cut; with fewer groups than ranks every rank holds all, and uses its own."""
    return shape.num_query_groups % size == 0


def shard_of(name: str, shape: ModelShape, rank: int, size: int) -> Shard | None:
    """The part of a parameter that a rank holds; None for all of it."""
    if size == 1:
        return None
    if name.endswith(COLUMN_PARALLEL) or (name.endswith(_KEY_VALUE) and shards_key_value(shape, size)):
        return Shard(0, rank, size)
    return Shard(1, rank, size) if name.endswith(ROW_PARALLEL) else None


def check_sharding(shape: ModelShape, size: int) -> None:
    """Refuses models that do not divide.

    Raises:
        ConfigError: naming the flag.
    """
    for flag, value in (
        ("--num-attention-heads", shape.num_attention_heads),
        ("--ffn-hidden-size", shape.ffn_hidden_size),
        ("the padded vocabulary", shape.padded_vocab_size),
    ):
        if value % size:
            raise ConfigError(f"{flag} {value} over {size} tensor-parallel ranks", f"multiples of {size}", "change one of them")
    groups = shape.num_query_groups
    if groups % size and size % groups:
        raise ConfigError(
            f"--num-query-groups {groups} over {size} tensor-parallel ranks",
            "groups that divide by the ranks, or ranks that divide by the groups",
            "change one of them",
        )
