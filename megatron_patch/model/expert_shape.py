"""The shape of a mixture of experts as plain numbers (no torch), and the check that it can be built.

In: numbers. Out: `ExpertShape`, a part of `ModelShape`. A block with experts has, in place of one feed-forward layer, a router and
`count` smaller feed-forward layers, of which each position uses `top_k` (Shazeer et al., arXiv 1701.06538).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.utils.findings import Findings


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a model: everything that determines their parameters and their use.

    Args:
        count: E, experts of a block.
        top_k: experts that each position uses.
        ffn_hidden_size: width of an expert.
        shared_ffn_hidden_size: width of the feed-forward layer that every position uses in addition (DeepSeekMoE, arXiv 2401.06066);
            0: there is none.
        score: how the router's logits become scores: softmax over the experts, or the sigmoid of each.
        renormalized: whether the weights of the chosen experts are their scores divided by the sum of these.
        scaling: factor of these weights.
        bias: whether a bias for each expert is added to its score for the choice alone, which balances the load (arXiv 2408.15664).
        dense_layers: numbers, from 0, of the blocks with an ordinary feed-forward layer, in ascending order.
    """

    count: int
    top_k: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalized: bool = True
    scaling: float = 1.0
    bias: bool = False
    dense_layers: tuple[int, ...] = ()


def check_expert_shape(experts: ExpertShape, num_layers: int) -> None:
    """Checks that experts of this shape can be built.

    Args:
        experts: their shape.
        num_layers: blocks of the model.

    Raises:
        ConfigError: they cannot; the error names all flags that are wrong.
    """
    found = Findings("of the experts")
    for flag, value, least in (
        ("--num-experts", experts.count, 2),
        ("--moe-ffn-hidden-size", experts.ffn_hidden_size, 1),
        ("--moe-shared-expert-intermediate-size", experts.shared_ffn_hidden_size, 0),
    ):
        if value < least:
            found.add(f"{flag} {value}", f"whole numbers from {least}", "give another value, or leave it out")
    if experts.count >= 2 and not 1 <= experts.top_k <= experts.count:
        found.add(f"--moe-router-topk {experts.top_k} of --num-experts {experts.count}", f"1 to {experts.count}", "change one of the two")
    if experts.scaling <= 0:
        found.add(f"--moe-router-topk-scaling-factor {experts.scaling}", "numbers above 0", "give another value, or leave it out")
    layers = experts.dense_layers
    if list(layers) != sorted(set(layers)) or not all(0 <= layer < num_layers for layer in layers) or len(layers) >= num_layers:
        found.add(
            f"blocks without experts: {layers}",
            f"some of the blocks 0 to {num_layers - 1}, in ascending order, but not all",
            "change --moe-layer-freq",
        )
    found.raise_all()
