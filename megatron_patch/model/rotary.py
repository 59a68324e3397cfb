"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form that Llama checkpoints use."""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_patch.model.shape import ModelShape


def rotary_frequencies(shape: ModelShape, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Returns the angle per position, base^(-2i/head_size) for i < head_size / 2, after the shape's scaling.

    "linear" divides all of them by the factor (Chen et al., arXiv 2306.15595). "llama3" divides frequencies of wavelengths longer than
    original positions / low factor, keeps those of wavelengths shorter than original positions / high factor, and interpolates between
    them (Llama 3.1, arXiv 2407.21783). "yarn" divides frequencies with fewer than `rotary_beta_slow` turns in the original context, keeps
    those with more than `rotary_beta_fast`, and interpolates between the two by the frequency's number, from the full number below to the
    full number above (Peng et al., arXiv 2309.00071, and its published code).

    Args:
        shape: the model's shape.
        dtype: dtype of the computation and the result, float32 or float64.
        device: device of the result.

    Returns:
        [head_size / 2].
    """
    exponents = torch.arange(0, shape.head_size, 2, dtype=dtype, device=device) / shape.head_size
    frequencies = 1.0 / shape.rotary_base**exponents
    if shape.rotary_scaling == "none":
        return frequencies
    scaled = frequencies / shape.rotary_factor
    if shape.rotary_scaling == "linear":
        return scaled
    if shape.rotary_scaling == "yarn":
        kept = _kept_by_yarn(shape, dtype, device)
        return (1.0 - kept) * scaled + kept * frequencies
    low, high = shape.rotary_low_frequency_factor, shape.rotary_high_frequency_factor
    waves_in_context = shape.rotary_original_positions * frequencies / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * scaled + kept * frequencies


def _kept_by_yarn(shape: ModelShape, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """Returns the share of each frequency that YaRN keeps, from 1 for the highest to 0 for the lowest, [head_size / 2]."""

    def number(turns: float) -> float:
        """The number of the frequency with so many turns in the original context, as a real number."""
        return shape.head_size * math.log(shape.rotary_original_positions / (turns * 2 * math.pi)) / (2 * math.log(shape.rotary_base))

    first = max(math.floor(number(shape.rotary_beta_fast)), 0)
    last = min(math.ceil(number(shape.rotary_beta_slow)), shape.head_size - 1)
    width = 0.001 if first == last else last - first  # a step, as in the published code
    return 1.0 - ((torch.arange(shape.head_size // 2, dtype=dtype, device=device) - first) / width).clamp(0.0, 1.0)


def attention_factor(shape: ModelShape) -> float:
    """Returns the factor of cosines and sines: with YaRN the given one, or 1 + 0.1 ln(factor) (arXiv 2309.00071, section 3.4); else 1."""
    if shape.rotary_scaling != "yarn":
        return 1.0
    given = shape.rotary_attention_factor
    return 0.1 * math.log(shape.rotary_factor) + 1.0 if given is None else given


def rotary_tables(positions: torch.Tensor, shape: ModelShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cosines and sines of position · frequency, repeated for both halves of a head, times the `attention_factor`.

    Args:
        positions: int64 [..., T].
        shape: the model's shape.
        dtype: dtype of the result; the computation is in float32 (float64 for float64).

    Returns:
        cos and sin, [..., T, head_size].
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None] * rotary_frequencies(shape, wide, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin, factor = angles.cos(), angles.sin(), attention_factor(shape)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def windowed_rotary_tables(positions: torch.Tensor, shape: ModelShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the `rotary_tables` of the blocks with a window, without scaling, or None where they are those of all blocks."""
    if shape.windowed_rotary_base is None:
        return None
    plain = dataclasses.replace(shape, rotary_base=shape.windowed_rotary_base, rotary_scaling="none")
    return rotary_tables(positions, plain, dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair (x_i, x_{i + head_size/2}) by the angle of its position.

    Args:
        heads: [B, heads, T, head_size].
        cos: [B or 1, 1, T, head_size].
        sin: like `cos`.

    Returns:
        Like `heads`.
    """
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
