"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form that Llama checkpoints use."""

from __future__ import annotations

import torch


def rotary_tables(positions: torch.Tensor, head_size: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position · base^(-2i/head_size), i < head_size / 2, each twice.

    Args:
        positions: int64 [..., T].
        head_size: width of a head, even.
        base: of the frequencies.
        dtype: of the result; computed in float32 (float64 for float64).

    Returns:
        cos and sin, [..., T, head_size].
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_size, 2, dtype=wide, device=positions.device) / head_size
    angles = positions.to(wide)[..., None] * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair (x_i, x_{i + head_size/2}) of [B, heads, T, head_size] by its position's angle."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
