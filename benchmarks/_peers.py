"""What `benchmarks/kernels.py` measures, operator by operator: our operators, torch's formulas, other libraries' losses.

A peer is made in a child process of its own, which imports what it needs: a library that is missing, or was built for another torch, costs
its own line. Only the standard library is imported at the top, so that the parent can read the lists at once.

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
"""What figures call an operator."""


@dataclass(frozen=True)
class Variant:
    """One way to call a peer.

    Args:
        name: as the tables have it.
        function: see above.
        overwrites: it writes over the logits, which nobody else may need then.
        whole: it is forward and backward in one, and leaves the gradient (of the sum over the labels of a row) in place of the logits; of
            the linear operator: the products alone, with no gradient to look at.
    """

    name: str
    function: Function
    overwrites: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Peer:
    """What one child process measures.

    Args:
        name: as `--peers` takes it.
        make: from a device's type ("cuda" or "cpu") to its variants.
        patch_sizes: the K that it takes; none: any.
        compiles: it compiles at its first call, for seconds: it is called once at each size before its turn alone.
        gpu: it is left out on a CPU unless asked for.
        ours: its failure is ours.
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
    """As the papers' code computes it: a float32 copy, one log-softmax, one `nll_loss` for each of the K labels."""
    import torch
    import torch.nn.functional as F

    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    losses = [F.nll_loss(log_probabilities, labels[:, k]) for k in range(labels.shape[1])]
    return torch.stack(losses).mean()


def _short_loss() -> Function:
    """The least that the formula needs, for torch.compile."""
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
        # What the head uses: weights known up front, the gradient in place of the logits.
        Variant("ours, loss and gradient in one go", torch.ops.megatron_patch.multi_token_loss_and_gradient_, whole=True),
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
    """A process group of this process alone, for losses over shards of the vocabulary."""
    import torch.distributed as dist

    # Its start looks for a network otherwise, and a machine may have none.
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

    # It overwrites what it is given: each label needs the logits anew.
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

    return [Variant("the three products alone", products, whole=True)]


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
"""In the order of their turns: ours, then torch's, then other libraries'. quack-kernels is measured where it is installed."""


def given(text: str) -> Peer:
    """A peer from the command line: NAME=MODULE:FUNCTION, of the operator's signature above.

    Raises:
        ValueError: the text is not of this form.
    """
    name, equals, where = text.partition("=")
    module, colon, function = where.partition(":")
    if not (name and equals and module and colon and function):
        raise ValueError(f"{text!r} is not a peer; allowed: NAME=MODULE:FUNCTION")
    return Peer(name, lambda device: _single(name, getattr(importlib.import_module(module), function)), compiles=True)


def what_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"
