"""Gradients of weights that are added to an accumulator the caller holds, instead of becoming tensors of their own.

An accumulator is a contiguous [V, H] tensor of the weight's shape and device, float32 (float64 for float64 weights), with memory of its
own: a master gradient that sums micro-batches. The fused operators add unrounded sums; the plain formulas add gradients that were rounded
to the weight's dtype. Each backward pass adds; the fused head's does so for `torch.autograd.grad(loss, hidden)`, too. With `unit_gradient`
the fused head adds in its forward pass instead, chunk by chunk: a call that raises may have added the chunks before. The weight's own
`.grad` stays as it is (None where it was None), and hooks on the weight run with None.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patch.ops.plain import accumulation_dtype


def check_accumulator(accumulator: torch.Tensor, weight: torch.Tensor) -> None:
    """Whether gradients of a weight can be added to an accumulator.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, dtype, device or layout than this module's first lines say, shares memory with the weight (which
            is not looked at where shapes alone are traced), or asks for a gradient itself.
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
            f"{dtype} {list(weight.shape)} on {weight.device}, which requires no gradient"
        )
    if not torch.compiler.is_compiling() and _overlap(accumulator, weight):
        raise ValueError("weight_grad_accumulator shares memory with the weight; allowed: memory of its own")


def _overlap(accumulator: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether tensors lie on top of each other, from the first to the last element; tensors that have no memory do not."""
    spans = []
    for tensor in (accumulator, weight):
        # Others, as those that are traced, may have no address.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0 or tensor.is_meta:
            return False
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    (first, first_end), (second, second_end) = spans
    return first < second_end and second < first_end


def check_unit_gradient(unit_gradient: bool, accumulator: torch.Tensor | None) -> None:
    """Whether a loss' gradient may be taken to be 1.

    Raises:
        ValueError: there is no accumulator.
    """
    if unit_gradient and accumulator is None:
        raise ValueError("unit_gradient is True without a weight_grad_accumulator; allowed: with one")


class _AddTo(torch.autograd.Function):
    """The weight itself; its gradient is added to the accumulator and goes no further."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, accumulator: torch.Tensor) -> torch.Tensor:
        ctx.accumulator = accumulator
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.accumulator.add_(grad)
        return None, None


def redirected(weight: torch.Tensor, accumulator: torch.Tensor | None) -> torch.Tensor:
    """The weight for a plain formula, with its gradient added to the accumulator; without one, the weight as it is."""
    if accumulator is None:
        return weight
    check_accumulator(accumulator, weight)
    return _AddTo.apply(weight, accumulator)
