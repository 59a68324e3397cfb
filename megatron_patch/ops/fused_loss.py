"""Multi-token loss in one pass over the logits: the operator, its autograd formula, shapes for tracing, and its vocabulary-parallel form.

Training uses `fused_linear_loss`; this operator takes logits that exist already.

In: logits (or a vocabulary shard of them) and K labels for each row. Out: a loss for each label and the log-sum-exp of each row, so that
the caller can weight, mask and normalize. The kernels compute 2 + K floats for each row (largest logit, sum of exponentials, label logits);
vocabulary shards exchange only these, once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_patch.ops import native
from megatron_patch.ops.plain import IGNORE_INDEX, accumulation_dtype


def multi_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each of a row's K labels (arXiv 2407.12665, equation 3), as `plain.multi_token_loss` does.

    Args:
        logits: [N, V or a shard of it].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        vocab_start: the token id of the shard's first column; None: the logits have the full vocabulary.
        group: the ranks that hold the shards; they exchange [N, 2 + K] floats once. None: there are no other shards.
        in_place: whether the backward pass overwrites the logits with their gradient; they must be contiguous and no longer needed.
            Ignored under torch.compile, which does not support it.

    Returns:
        (negative log-likelihoods in nats [N, K], 0 for labels that are not scored; log-sum-exp of each row [N]), float32 (float64 stays
        float64).

    Raises:
        ValueError: `labels` out of range (checked only without `vocab_start`), or an argument of the wrong shape or dtype. On a GPU,
            where the check would have to wait, the kernel prints labels out of range and ends the process's CUDA work.
    """
    name = None if group is None else group.group_name
    nll, lse, _ = torch.ops.megatron_patch.multi_token_loss(
        logits, labels, vocab_start, name, in_place and not torch.compiler.is_compiling()
    )
    return nll, lse


def losses_from_statistics(
    statistics: torch.Tensor, labels: torch.Tensor, group: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Combines the statistics of all shards into losses.

    Args:
        statistics: [N, 2 + K] of this shard: largest logit, sum of exponentials, label logits (0 for labels of other shards).
        labels: int64 [N, K].
        group: name of the process group that holds the shards, or None.

    Returns:
        (normalizer [N, 2]: largest logit and sum of exponentials; losses [N, K]; log-sum-exp [N]).
    """
    if group is not None:
        collectives = torch.ops._c10d_functional
        size = dist.distributed_c10d._get_group_size_by_name(cast(Any, group))
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(statistics, size, group))
        shards = gathered.view(size, *statistics.shape)
        largest = shards[..., 0].amax(dim=0)
        sums = (shards[..., 1] * torch.exp(shards[..., 0] - largest)).sum(dim=0)
        label_logits = shards[..., 2:].sum(dim=0)
    else:
        largest, sums, label_logits = statistics[:, 0], statistics[:, 1], statistics[:, 2:]
    log_sums = sums.log()
    # Subtracts the logits first: the logarithm, added to the largest logit, would lose the digits of a small loss.
    nll = (largest[:, None] - label_logits) + log_sums[:, None]
    return torch.stack((largest, sums), dim=1), torch.where(labels == IGNORE_INDEX, 0.0, nll), largest + log_sums


def _loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_start: int | None = None, group: str | None = None, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if in_place and not logits.is_contiguous():
        raise ValueError("logits must be contiguous to be overwritten")
    statistics = torch.ops.megatron_patch.multi_token_loss_statistics(logits, labels, vocab_start)
    normalizer, nll, lse = losses_from_statistics(statistics, labels, group)
    return nll, lse, normalizer


def _register() -> None:
    library = "megatron_patch::multi_token_loss"
    schema = "(Tensor logits, Tensor labels, int? vocab_start=None, str? group=None, bool in_place=False) -> (Tensor, Tensor, Tensor)"
    torch.library.define(library, schema)
    torch.library.impl(library, ("CPU", "CUDA"))(_loss)

    @torch.library.register_fake(library)
    def _(
        logits: torch.Tensor, labels: torch.Tensor, vocab_start: int | None = None, group: str | None = None, in_place: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = accumulation_dtype(logits.dtype)
        return (
            logits.new_empty(labels.shape, dtype=dtype),
            logits.new_empty(labels.shape[:1], dtype=dtype),
            logits.new_empty((labels.shape[0], 2), dtype=dtype),
        )

    @torch.library.register_fake("megatron_patch::multi_token_loss_statistics")
    def _(logits: torch.Tensor, labels: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        return logits.new_empty((labels.shape[0], 2 + labels.shape[1]), dtype=accumulation_dtype(logits.dtype))

    @torch.library.register_fake("megatron_patch::multi_token_loss_gradient")
    def _(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megatron_patch::multi_token_loss_gradient_")
    def _(logits: torch.Tensor, *others: Any) -> None:
        return None

    @torch.library.register_fake("megatron_patch::multi_token_loss_and_gradient_")
    def _(logits: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor | None = None, z_loss: float = 0.0) -> torch.Tensor:
        return logits.new_empty(labels.shape[:1], dtype=accumulation_dtype(logits.dtype))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits, labels, ctx.vocab_start, _, ctx.in_place = inputs
        ctx.save_for_backward(logits, labels, output[2])

    def backward(ctx: Any, grad_nll: torch.Tensor, grad_lse: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, normalizer = ctx.saved_tensors
        arguments = (labels, normalizer, grad_nll, grad_lse, ctx.vocab_start)
        if ctx.in_place:
            gradient = logits.detach()
            torch.ops.megatron_patch.multi_token_loss_gradient_(gradient, *arguments)
        else:
            gradient = torch.ops.megatron_patch.multi_token_loss_gradient(logits, *arguments)
        return gradient, None, None, None, None

    torch.library.register_autograd(library, backward, setup_context=setup_context)


if native.load_error() is None:
    _register()
