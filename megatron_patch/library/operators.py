"""The operators of the method, with checks of shapes: patch embedding, and the loss of each position over the K labels of the next patch.

In: weights, token ids, hidden states or logits, labels. Out: embeddings; sums of losses. `torch.compile(fullgraph=True)`, autocast,
gradient checkpointing, DDP and FSDP2 may be around them. Compiled kernels compute them where they are built, else the plain formulas.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_patch import ops
from megatron_patch.ops import Operators, VocabularyShard


def patch_embedding(
    weight: torch.Tensor, token_ids: torch.Tensor, *, vocab_start: int | None = None, operators: Operators = "fused"
) -> torch.Tensor:
    """Returns the mean of the K token embeddings of each patch (arXiv 2407.12665, section 2); at K = 1 the embeddings themselves.

    Args:
        weight: the embedding table, floating point [V, H], or this rank's shard of its rows.
        token_ids: int64 [..., T, K].
        vocab_start: with a shard, the token id of its first row. Ids of other shards add nothing, so the sum over all ranks is the full
            result. None: the table has the full vocabulary.
        operators: "fused" for compiled kernels where they are built, "plain" for the formula.

    Returns:
        [..., T, H] in the weight's dtype, averaged in float32 (float64 stays float64).

    Raises:
        ValueError: a shape or a dtype is wrong, or a token id is out of range (on a GPU the kernel reports it).

    Examples:
        >>> import torch
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
        >>> patch_embedding(table, torch.tensor([[[1, 2], [2, 2]]]))
        tensor([[[2., 3.],
                 [3., 4.]]])
    """
    _check_matrix("weight", weight, "[V, H]")
    if token_ids.dtype != torch.int64 or token_ids.dim() < 2 or token_ids.shape[-1] < 1:
        raise ValueError(
            f"token_ids are {token_ids.dtype} {list(token_ids.shape)}; allowed: int64 [..., T, K], also at K = 1; "
            "cut the tokens into patches with PatchCollator or token_ids.unflatten(-1, (-1, K))"
        )
    return ops.patch_embedding(weight, token_ids, operators, vocab_start)


def multi_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    *,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    operators: Operators = "fused",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss of logits for the K labels of each position (arXiv 2407.12665, equation 3); at K = 1 the cross-entropy.

    Args:
        logits: floating point [..., V], or this rank's shard of its columns.
        labels: int64 [..., K], with the dimensions of the logits before the last one; -100 is not scored.
        label_weights: [K], weights of the K labels; None: 1 for each.
        vocab_start: with a shard, the token id of its first column; None: the logits have the full vocabulary.
        group: the ranks that hold the shards, which exchange 2 + K numbers a position; None: no other ranks.
        operators: "fused" for compiled kernels where they are built, "plain" for the formula.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), two scalars in float32 (float64 stays float64). Their ratio
        is the mean loss. Divide by the second one's sum over the micro-batches and ranks of a step for the mean over that step.

    Raises:
        ValueError: a shape or a dtype is wrong, or a label is out of range (on a GPU the kernel reports it).

    Examples:
        >>> import torch
        >>> total, weight = multi_token_loss(torch.zeros(2, 3, 8), torch.tensor([[[1, 2], [3, 4], [5, -100]]] * 2))
        >>> round(float(total / weight), 4), float(weight)  # log 8, for 10 labels
        (2.0794, 10.0)
    """
    if logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; allowed: floating point [..., V]; give the head's output")
    _check_whole("logits", logits)
    _check_labels("logits", logits, labels, label_weights)
    rows, columns = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1, labels.shape[-1])
    return ops.multi_token_loss(rows, columns, label_weights, operators, _shard(vocab_start, group))


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    *,
    logit_softcap: float | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    operators: Operators = "fused",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `multi_token_loss(hidden @ weight.T, …)` returns; the kernels never hold the logits of a full batch.

    Args:
        hidden: floating point [..., H], the last hidden states.
        weight: the head's weight [V, H], or this rank's shard of its rows. It has the dtype of `hidden`, except under autocast, which
            casts both, as it does for `torch.nn.functional.linear`.
        labels: int64 [..., K], with the dimensions of `hidden` before the last one; -100 is not scored.
        label_weights: [K], weights of the K labels; None: 1 for each.
        logit_softcap: c of logits that are capped to c·tanh(logit / c); None: they are not.
        vocab_start: with a shard, the token id of its first row; None: the weight has the full vocabulary.
        group: the ranks that hold the shards. The gradient of `hidden` is this shard's part: sum it over the group.
        operators: "fused" for compiled kernels where they are built, "plain" for the formula.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), as `multi_token_loss`.

    Raises:
        ValueError: a shape or a dtype is wrong, or a label is out of range (on a GPU the kernel reports it).

    Examples:
        >>> import torch
        >>> hidden, head = torch.randn(2, 3, 4), torch.randn(8, 4)
        >>> labels = torch.randint(8, (2, 3, 2))
        >>> total, weight = linear_multi_token_loss(hidden, head, labels)
        >>> expected, _ = multi_token_loss(hidden @ head.T, labels)
        >>> torch.allclose(total, expected), float(weight)
        (True, 12.0)
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check_matrix("weight", weight, "[V, H]")
    if hidden.dim() < 1 or hidden.dtype != weight.dtype or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} {list(weight.shape)}; allowed: [..., H] and [V, H] of "
            "one dtype; give the hidden states before the head and the head's weight, or use autocast"
        )
    _check_labels("hidden", hidden, labels, label_weights)
    return ops.linear_multi_token_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1, labels.shape[-1]),
        label_weights,
        operators,
        _shard(vocab_start, group),
        logit_softcap=logit_softcap,
    )


def _shard(vocab_start: int | None, group: dist.ProcessGroup | None) -> VocabularyShard | None:
    if vocab_start is None and group is not None:
        raise ValueError("group without vocab_start; allowed: both, or neither; give the token id of the shard's first row as vocab_start")
    return None if vocab_start is None else VocabularyShard(vocab_start, group)


def _check_matrix(name: str, tensor: torch.Tensor, shape: str) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; allowed: floating point {shape}; give a matrix of weights")
    _check_whole(name, tensor)


def _check_whole(name: str, tensor: torch.Tensor) -> None:
    # By its name, because importing DTensor takes time that most users need not spend.
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor; allowed: a tensor of this rank; call the operator inside the forward pass of the module that FSDP2 "
            "gathers, or give a shard with vocab_start and group: weight.to_local()"
        )


def _check_labels(name: str, rows: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor | None) -> None:
    if labels.dtype != torch.int64 or labels.dim() != rows.dim() or labels.shape[:-1] != rows.shape[:-1] or labels.shape[-1] < 1:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)} for {name} of shape {list(rows.shape)}; allowed: int64 "
            f"{[*rows.shape[:-1], 'K']}, the K tokens of each position's next patch; cut them with PatchCollator"
        )
    if label_weights is not None and label_weights.shape != labels.shape[-1:]:
        raise ValueError(
            f"label_weights have the shape {list(label_weights.shape)} for {labels.shape[-1]} labels of a position; allowed: one for each "
            "label; give Stage.weights_at(step) of the labels' stage, and batch_size=None to a data loader over a TokenStream"
        )
