"""Losses of other libraries, where they are installed: one label a row, on a GPU. What does not load here is told, and left out.

Some overwrite what they are given with its gradient: hand them logits that nobody else needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LinearLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def what_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'without a word'}"


def _group() -> dist.ProcessGroup:
    """A process group of this process alone, for losses over shards of the vocabulary."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: liger_cross_entropy(logits, labels[:, 0])


def _liger_shards() -> Loss:
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    loss, group = LigerMegatronCrossEntropy(), _group()
    return lambda logits, labels: loss(logits[:, None], labels[:, :1], group).mean()


def _megatron_fused() -> Loss:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = _group()
    return lambda logits, labels: fused_vocab_parallel_cross_entropy(logits[:, None], labels[:, :1], group).mean()


def _megatron_unfused() -> Loss:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _group()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return lambda logits, labels: vocab_parallel_cross_entropy(logits[:, None], labels[:, :1]).mean()


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels[:, 0], reduction="mean", inplace_backward=True)


def _liger_linear() -> LinearLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, labels: liger_fused_linear_cross_entropy(h, w, labels[:, 0], accum_dtype=torch.float32)


def _cut() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, labels: linear_cross_entropy(h, w, labels[:, 0])


def _quack_linear() -> LinearLoss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, labels: chunked_linear_cross_entropy(h, w, labels[:, 0])


def _made(makers: dict[str, Callable[[], Callable[..., torch.Tensor]]], device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    found: dict[str, Callable[..., torch.Tensor]] = {}
    if device.type != "cuda":
        return found
    for name, make in makers.items():
        try:
            found[f"{name}, one label"] = make()
        except Exception as error:  # of any kind: a library may have been built for another torch
            print(f"{name} is left out: {what_of(error)}")
    return found


def losses(device: torch.device) -> dict[str, Loss]:
    """Name -> mean loss of (logits [N, V], labels [N, 1])."""
    makers = {"Liger": _liger, "Liger vocabulary-parallel": _liger_shards}
    makers |= {"Megatron core fused": _megatron_fused, "Megatron core unfused": _megatron_unfused, "quack": _quack}
    return _made(makers, device)


def linear_losses(device: torch.device) -> dict[str, LinearLoss]:
    """Name -> mean loss of (hidden [N, H], weight [V, H], labels [N, 1])."""
    return _made({"Liger": _liger_linear, "cut-cross-entropy": _cut, "quack": _quack_linear}, device)
