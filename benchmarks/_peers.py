"""The implementations that `benchmarks/kernels.py` compares: our operators, torch's formulas, losses of other libraries.

Each peer is made in its own child process, which imports the library, so that a missing or incompatible library affects only its own
peers. This module imports only the standard library at the top, so that the parent can read the lists quickly.

Signatures, with logits [N, V], hidden [N, H], weight [V, H], labels [N, K], ids [N, K]:
loss: (logits, labels) → mean loss; embedding: (weight, ids) → means [N, H]; linear: (hidden, weight, labels) → mean loss.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Function = Callable[..., Any]
OPERATORS = {"loss": "multi_token_loss", "embedding": "patch_embedding", "linear": "linear_multi_token_loss"}
"""Names of the operators in figures."""


@dataclass(frozen=True)
class Variant:
    """One way to call a peer.

    Args:
        name: name in the tables.
        function: function with the signature of the operator, as listed above.
        overwrites: whether the function overwrites the logits.
        combined: whether the function computes forward and backward at once and replaces the logits with the gradient of the sum over the
            labels of a row. For the linear operator: whether it computes the products alone, without a gradient to check.
    """

    name: str
    function: Function
    overwrites: bool = False
    combined: bool = False


@dataclass(frozen=True)
class Peer:
    """An implementation that one child process measures.

    Args:
        name: name for `--peers`.
        make: function from a device type ("cuda" or "cpu") to its variants.
        patch_sizes: values of K that it supports; an empty tuple means any.
        compiles: whether its first call compiles for seconds; it is then called once at each size before it is measured.
        gpu: whether it is skipped on a CPU unless `--peers` names it.
        ours: whether it is an operator of this project, whose failure fails the benchmark.
    """

    name: str
    make: Callable[[str], list[Variant]]
    patch_sizes: tuple[int, ...] = ()
    compiles: bool = False
    gpu: bool = False
    ours: bool = False


def _single(name: str, function: Function, overwrites: bool = False) -> list[Variant]:
    return [Variant(name, function, overwrites)]


def patch_train_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss as the papers' code computes it: a float32 copy, one log-softmax, one `nll_loss` for each of the K labels."""
    import torch
    import torch.nn.functional as F

    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    losses = [F.nll_loss(log_probabilities, labels[:, k]) for k in range(labels.shape[1])]
    return torch.stack(losses).mean()


def _short_loss() -> Function:
    """Returns the shortest form of the loss, for torch.compile."""
    import torch

    def short_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wide = logits.float()
        return (torch.logsumexp(wide, dim=-1) - wide.gather(1, labels).mean(dim=1)).mean()

    return short_loss


def _our_losses(device: str) -> list[Variant]:
    import torch

    from megatron_patch.ops import fused_loss

    return [
        Variant("ours, losses label by label", lambda z, y: fused_loss.multi_token_loss(z, y)[0].mean()),
        Variant("ours, the same in place", lambda z, y: fused_loss.multi_token_loss(z, y, in_place=True)[0].mean(), overwrites=True),
        # The variant that the head uses: weights known in advance, the gradient in place of the logits.
        Variant("ours, loss and gradient in one go", torch.ops.megatron_patch.multi_token_loss_and_gradient_, combined=True),
    ]


def _papers(device: str) -> list[Variant]:
    return _single("papers' code, eager", patch_train_loss)


def _plain_loss(device: str) -> list[Variant]:
    from megatron_patch.ops import plain

    return _single("plain formula", lambda z, y: plain.multi_token_loss(z, y)[0].mean())


def _compiled_loss(device: str) -> list[Variant]:
    import torch

    return _single("torch.compile of lse - gather", torch.compile(_short_loss(), dynamic=False))


def _group(device: str) -> dist.ProcessGroup:
    """Returns a process group with only this process, for losses over vocabulary shards."""
    import torch.distributed as dist

    # Without these it looks for a network, which the machine may not have.
    os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def _liger(device: str) -> list[Variant]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _single("Liger, one label", lambda z, y: liger_cross_entropy(z, y[:, 0]), overwrites=True)


def _liger_times(device: str) -> list[Variant]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It overwrites its input, so each label needs a copy of the logits.
    return _single("Liger, K times", lambda z, y: sum(liger_cross_entropy(z.clone(), column) for column in y.t().contiguous()) / y.shape[1])


def _liger_shards(device: str) -> list[Variant]:
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    loss, group = LigerMegatronCrossEntropy(), _group(device)
    return _single("Liger vocabulary-parallel, one label", lambda z, y: loss(z[:, None], y[:, :1], group).mean())


def _megatron_fused(device: str) -> list[Variant]:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = _group(device)
    return _single("Megatron core fused, one label", lambda z, y: fused_vocab_parallel_cross_entropy(z[:, None], y[:, :1], group).mean())


def _megatron_unfused(device: str) -> list[Variant]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _group(device)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    return _single("Megatron core unfused, one label", lambda z, y: vocab_parallel_cross_entropy(z[:, None], y[:, :1]).mean())


def _quack(device: str) -> list[Variant]:
    from quack.cross_entropy import cross_entropy

    return _single("quack, one label", lambda z, y: cross_entropy(z, y[:, 0], reduction="mean", inplace_backward=True), overwrites=True)


def _our_embeddings(device: str) -> list[Variant]:
    from megatron_patch.ops import fused_embedding

    return _single("ours", fused_embedding.patch_embedding)


def _embedding_and_mean(device: str) -> list[Variant]:
    import torch.nn.functional as F

    return _single("F.embedding + mean", lambda w, ids: F.embedding(ids, w).mean(dim=-2))


def _plain_embedding(device: str) -> list[Variant]:
    from megatron_patch.ops import plain

    return _single("plain formula", plain.patch_embedding)


def _embedding_bag(device: str) -> list[Variant]:
    import torch.nn.functional as F

    return _single("F.embedding_bag", lambda w, ids: F.embedding_bag(ids, w, mode="mean"))


def _compiled_embedding(device: str) -> list[Variant]:
    import torch
    import torch.nn.functional as F

    return _single("torch.compile", torch.compile(lambda w, ids: F.embedding(ids, w).float().mean(dim=-2).to(w.dtype), dynamic=False))


def _our_linear(device: str) -> list[Variant]:
    from megatron_patch.ops.fused_linear_loss import linear_multi_token_loss

    def chunks_of(rows: int) -> Variant:
        return Variant(f"ours, chunks of {rows}", lambda h, w, y: linear_multi_token_loss(h, w, y, chunk_rows=rows)[0] / y.numel())

    return [chunks_of(1024), chunks_of(4096)]


def _products(device: str) -> list[Variant]:
    import torch.nn.functional as F

    def products(hidden: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        F.linear(hidden, weight)
        gradient @ weight
        gradient.t() @ hidden

    return [Variant("the three products alone", products, combined=True)]


def _papers_linear(device: str) -> list[Variant]:
    import torch.nn.functional as F

    return _single("papers' code, eager", lambda h, w, y: patch_train_loss(F.linear(h, w), y))


def _compiled_linear(device: str) -> list[Variant]:
    import torch
    import torch.nn.functional as F

    short_loss = _short_loss()
    return _single("torch.compile of lse - gather", torch.compile(lambda h, w, y: short_loss(F.linear(h, w), y), dynamic=False))


def _liger_linear(device: str) -> list[Variant]:
    import torch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _single("Liger, one label", lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y[:, 0], accum_dtype=torch.float32))


def _cut(device: str) -> list[Variant]:
    from cut_cross_entropy import linear_cross_entropy

    return _single("cut-cross-entropy, one label", lambda h, w, y: linear_cross_entropy(h, w, y[:, 0]))


def _quack_linear(device: str) -> list[Variant]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _single("quack, one label", lambda h, w, y: chunked_linear_cross_entropy(h, w, y[:, 0]))


PEERS: dict[str, list[Peer]] = {
    "loss": [
        Peer("ours", _our_losses, ours=True),
        Peer("papers' code", _papers),
        Peer("torch.compile", _compiled_loss, compiles=True),
        Peer("Liger", _liger, (1,), compiles=True, gpu=True),
        Peer("Liger vocabulary-parallel", _liger_shards, (1,), compiles=True, gpu=True),
        Peer("Megatron core fused", _megatron_fused, (1,), compiles=True, gpu=True),
        Peer("Megatron core unfused", _megatron_unfused, (1,), compiles=True, gpu=True),
        Peer("Liger, K times", _liger_times, (4,), compiles=True, gpu=True),
        Peer("quack", _quack, (1,), compiles=True, gpu=True),
        Peer("plain formula", _plain_loss),
    ],
    "embedding": [
        Peer("ours", _our_embeddings, ours=True),
        Peer("F.embedding + mean", _embedding_and_mean),
        Peer("F.embedding_bag", _embedding_bag),
        Peer("torch.compile", _compiled_embedding, compiles=True),
        Peer("plain formula", _plain_embedding),
    ],
    "linear": [
        Peer("ours", _our_linear, ours=True),
        Peer("products", _products),
        Peer("papers' code", _papers_linear),
        Peer("torch.compile", _compiled_linear, compiles=True),
        Peer("Liger", _liger_linear, (1,), compiles=True, gpu=True),
        Peer("cut-cross-entropy", _cut, (1,), compiles=True, gpu=True),
        Peer("quack", _quack_linear, (1,), compiles=True, gpu=True),
    ],
}
"""Peers by operator, in the order in which they run: ours, torch's, other libraries'. Libraries are optional."""


def parse_peer(text: str) -> Peer:
    """Returns the peer of the command line's NAME=MODULE:FUNCTION; the function needs the operator's signature above.

    Raises:
        ValueError: the text does not have this form.
    """
    name, equals, target = text.partition("=")
    module, colon, function = target.partition(":")
    if not (name and equals and module and colon and function):
        raise ValueError(f"{text!r} is not a peer; allowed: NAME=MODULE:FUNCTION")
    return Peer(name, lambda device: _single(name, getattr(importlib.import_module(module), function)), compiles=True)


def error_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"
