"""Gradient accumulators: tensors of the caller to which the operators add the weight's gradient, instead of setting its `.grad`.

An accumulator (`weight_grad_accumulator`) is a contiguous tensor with the weight's shape and device, float32 (float64 for float64 weights),
which shares no memory with the weight: a master gradient that sums micro-batches. Each backward pass adds to it; that of the fused head
also does so for `torch.autograd.grad(loss, hidden)`. The weight gets no gradient: its `.grad` does not change, and its hooks receive None.
The fused operators add unrounded sums; the plain formulas add gradients rounded to the weight's dtype.

`unit_gradient` is an option of the fused head. With an accumulator, True promises that the backward pass starts from this loss, with all
factors in `label_weights`. Then the forward pass adds the weight's gradient, chunk by chunk and without a temporary table of its size, and
backward passes add nothing.

- A backward pass with a gradient other than 1 makes the gradient of `hidden` NaN. If `hidden` requires none, the error goes unnoticed.
- Where the forward pass runs again (recomputation), the gradient would be added twice: do not use it there.
- A call that raises may have added the chunks before the one that raised.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patch.ops.plain import accumulation_dtype


def check_accumulator(accumulator: torch.Tensor, weight: torch.Tensor) -> None:
    """Checks that gradients of a weight can be added to an accumulator.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has the wrong shape, dtype, device or layout, requires a gradient, or shares memory with the weight (not checked
            while torch.compile traces).
    """
    dtype = accumulation_dtype(weight.dtype)
    if not isinstance(accumulator, torch.Tensor):
        raise TypeError(
            f"weight_grad_accumulator is {type(accumulator).__name__} {accumulator!r}; allowed: a contiguous {dtype} tensor "
            f"{list(weight.shape)} on {weight.device}, or None"
        )
    same = accumulator.shape == weight.shape and accumulator.dtype == dtype and accumulator.device == weight.device
    if not same or not accumulator.is_contiguous() or accumulator.requires_grad:
        found = "" if accumulator.is_contiguous() else ", not contiguous"
        found += ", which requires a gradient" if accumulator.requires_grad else ""
        raise ValueError(
            f"weight_grad_accumulator is {accumulator.dtype} {list(accumulator.shape)} on {accumulator.device}{found}; allowed: contiguous "
            f"{dtype} {list(weight.shape)} on {weight.device}, which does not require a gradient"
        )
    if not torch.compiler.is_compiling() and _overlap(accumulator, weight):
        raise ValueError("weight_grad_accumulator shares memory with the weight; allowed: a tensor with separate memory")


def _overlap(accumulator: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the memory spans of two tensors, from the first to the last element, overlap; tensors without memory do not."""
    spans = []
    for tensor in (accumulator, weight):
        # Subclasses, such as traced tensors, may have no address.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0 or tensor.is_meta:
            return False
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    (first, first_end), (second, second_end) = spans
    return first < second_end and second < first_end


def check_unit_gradient(unit_gradient: bool, accumulator: torch.Tensor | None) -> None:
    """Checks that `unit_gradient` is given together with an accumulator.

    Raises:
        ValueError: there is no accumulator.
    """
    if unit_gradient and accumulator is None:
        raise ValueError("unit_gradient is True without weight_grad_accumulator; allowed: both, or neither")


class _AccumulateGradient(torch.autograd.Function):
    """Returns the weight; the backward pass adds its gradient to the accumulator and gives the weight none."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, accumulator: torch.Tensor) -> torch.Tensor:
        ctx.accumulator = accumulator
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.accumulator.add_(grad)
        return None, None


def redirect_gradient(weight: torch.Tensor, accumulator: torch.Tensor | None) -> torch.Tensor:
    """Returns the weight, such that the gradient of what uses it is added to the accumulator; without an accumulator, the weight itself."""
    if accumulator is None:
        return weight
    check_accumulator(accumulator, weight)
    return _AccumulateGradient.apply(weight, accumulator)
