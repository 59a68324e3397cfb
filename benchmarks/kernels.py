#!/usr/bin/env python
"""The fused operators beside their peers: time, traffic, share of the machine's ceiling, peak memory, error against float64.

    python benchmarks/kernels.py                        on this machine, GPU or CPU, at the sizes that docs/performance.md quotes
    python benchmarks/kernels.py --operators loss --rows 2048 --vocab 32000 --patch-sizes 1 4

Peers: the formula as the papers' code writes it, our plain formula, torch.compile of the shortest formula, torch's own fused modules, and
Liger, Megatron core, cut-cross-entropy and quack where they are installed (they take one label a row). Everything runs in one process; a
peer that fails is told and left out. Results are written after every size, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import Timer, Work, ceilings, print_table, write_results
from _peers import LinearLoss, Loss, linear_losses, losses, what_of

from megatron_patch.ops import fused_embedding, fused_linear_loss, fused_loss, native, plain

kernels = torch.ops.megatron_patch
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operators", nargs="+", choices=("loss", "embedding", "linear"), default=["loss", "embedding", "linear"])
    parser.add_argument("--rows", type=int, nargs="+", help="positions N (default: 2048 8192 on a GPU, 1024 on a CPU)")
    parser.add_argument("--hidden", type=int, nargs="+", help="H (default: 1024 4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--vocab", type=int, nargs="+", help="V (default: 32000 128256 on a GPU, 32000 on a CPU)")
    parser.add_argument("--patch-sizes", type=int, nargs="+", help="K (default: 1 2 4 8 on a GPU, 1 4 on a CPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--rounds", type=int, help="(default: 20 on a GPU, 7 on a CPU)")
    parser.add_argument("--threads", type=int, help="of a CPU")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.rows = args.rows or ([2048, 8192] if cuda else [1024])
    args.hidden = args.hidden or ([1024, 4096] if cuda else [1024])
    args.vocab = args.vocab or ([32_000, 128_256] if cuda else [32_000])
    args.patch_sizes = args.patch_sizes or ([1, 2, 4, 8] if cuda else [1, 4])
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    args.rounds = args.rounds or (20 if cuda else 7)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def patch_train_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the papers' code computes it: a float32 copy, one log-softmax, one `nll_loss` for each of the K labels."""
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    losses = [F.nll_loss(log_probabilities, labels[:, k]) for k in range(labels.shape[1])]
    return torch.stack(losses).mean()


def short_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The least that the formula needs, for torch.compile."""
    wide = logits.float()
    return (torch.logsumexp(wide, dim=-1) - wide.gather(1, labels).mean(dim=1)).mean()


def gradient_of(function: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Work:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(), inputs)


def that_run(peers: dict[str, Work]) -> dict[str, Work]:
    """Those peers that run here. Ours must."""
    kept = {}
    for name, work in peers.items():
        try:
            work()
        except Exception as error:  # of any kind: another library's compiler, its limits, memory
            if name.startswith("ours"):
                raise
            print(f"{name} is left out: {what_of(error)}")
        else:
            kept[name] = work
    return kept


def compare(
    timer: Timer,
    title: str,
    forwards: dict[str, Work],
    both: dict[str, Work],
    least_bytes: float,
    flops: float,
    limits: dict[str, float],
    errors_of: dict[str, Callable[[], float]],
) -> list[Row]:
    """Times all peers, prints a table, returns its rows. Ratios are to the last peer, which is ours."""
    both = that_run(both)
    errors = {name: error() for name, error in errors_of.items() if name in both}
    forward_times, both_times = timer.medians(that_run({name: forwards[name] for name in both if name in forwards})), timer.medians(both)
    peaks = {name: timer.peak_bytes(work) for name, work in both.items()}
    ours = list(both_times)[-1]
    rows, lines = [], []
    for name, seconds in both_times.items():
        rate = flops / seconds / 1e12 if flops else least_bytes / seconds / 1e9
        ceiling = limits["product_tflop_per_second"] if flops else limits["copy_gb_per_second"]
        row = {
            "peer": name,
            "forward_ms": forward_times.get(name, float("nan")) * 1e3,
            "forward_backward_ms": seconds * 1e3,
            "times_ours": seconds / both_times[ours],
            "tflop_per_second" if flops else "gb_per_second": rate,
            "share_of_ceiling": rate / ceiling,
            "peak_mb": peaks[name] / 1e6,
            "error": errors.get(name),
        }
        rows.append(row)
        error = f"{row['error']:.1e}" if row["error"] is not None else "-"
        forward = f"{row['forward_ms']:.3f}" if name in forward_times else "-"
        speed = (f"{seconds * 1e3:.3f}", f"{row['times_ours']:.2f}", f"{rate:.3g}", f"{row['share_of_ceiling']:.0%}")
        lines.append([name, forward, *speed, f"{row['peak_mb']:.1f}", error])
    unit = "TFLOP/s" if flops else "GB/s"
    print_table(title, ["peer", "forward ms", "+ backward ms", "x ours", unit, "of ceiling", "peak MB", "error"], lines)
    return rows


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Of a gradient: the norm of the difference over the norm."""
    return float((value.double() - exact).norm() / exact.norm())


def exact_gradient(logits: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
    """Of the mean loss over `rows` rows, for some of them: (softmax - the labels' share) / rows, in float64."""
    gradient = torch.softmax(logits.double(), dim=1)
    share = torch.full(labels.shape, -1.0 / labels.shape[1], dtype=torch.float64, device=logits.device)
    return gradient.scatter_add_(1, labels, share).div_(rows)


def chunks(rows: int, vocab: int) -> list[slice]:
    """Rows whose logits are 1 GB in float64."""
    size = max(1, (1 << 27) // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)]


def loss_error(gradient: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """`relative_error` of the gradient for the logits, chunk by chunk."""
    wrong = size = 0.0
    for part in chunks(*logits.shape):
        exact = exact_gradient(logits[part], labels[part], len(logits))
        wrong += float((gradient[part].double() - exact).square().sum())
        size += float(exact.square().sum())
    return (wrong / size) ** 0.5


def exact_weight_gradient(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the mean loss of the head, in float64."""
    wide = weight.double()
    total = torch.zeros_like(wide)
    for part in chunks(len(states), len(weight)):
        hidden = states[part].double()
        total.addmm_(exact_gradient(hidden @ wide.t(), labels[part], len(states)).t(), hidden)
    return total


def bench_loss(timer: Timer, rows: int, vocab: int, k: int, dtype: torch.dtype, limits: dict[str, float]) -> list[Row]:
    """Loss and gradient on given logits."""
    device = timer.device
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, device=device, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
    peers: dict[str, Loss] = {
        "papers' code, eager": patch_train_loss,
        "plain formula": lambda z, y: plain.multi_token_loss(z, y)[0].mean(),
        "torch.compile of lse - gather": torch.compile(short_loss),
        **(losses(device) if k == 1 else {}),
        "ours, losses label by label": lambda z, y: fused_loss.multi_token_loss(z, y)[0].mean(),
        "ours, the same in place": lambda z, y: fused_loss.multi_token_loss(z, y, in_place=True)[0].mean(),
    }
    # What gradients overwrite, by us or by others: its values do not change the speed.
    overwritten = logits.detach().clone().requires_grad_()

    def its_error(function: Loss) -> float:
        fresh = logits.detach().clone().requires_grad_()
        return loss_error(torch.autograd.grad(function(fresh, labels), fresh)[0], logits.detach(), labels)

    def error_in_one_go() -> float:
        fresh = logits.detach().clone()
        kernels.multi_token_loss_and_gradient_(fresh, labels)
        return loss_error(fresh.double() / (rows * k), logits.detach(), labels)

    forwards: dict[str, Work] = {}
    both: dict[str, Work] = {}
    errors: dict[str, Callable[[], float]] = {}
    for name, function in peers.items():
        given = overwritten if "one label" in name or "in place" in name else logits
        forwards[name] = lambda function=function, given=given: function(given, labels)
        both[name] = gradient_of(forwards[name], given)
        errors[name] = lambda function=function: its_error(function)
    # What the head uses: weights known up front, the gradient in place of the logits.
    buffer = overwritten.detach()
    both["ours, loss and gradient in one go"] = lambda: kernels.multi_token_loss_and_gradient_(buffer, labels)
    errors["ours, loss and gradient in one go"] = error_in_one_go
    title = f"multi_token_loss, N = {rows}, V = {vocab:,}, K = {k}, {str(dtype).removeprefix('torch.')}"
    traffic = 2 * rows * vocab * logits.element_size()
    found = compare(timer, title, forwards, both, traffic, 0, limits, errors)
    return [{"operator": "multi_token_loss", "rows": rows, "vocab": vocab, "patch_size": k, **row} for row in found]


def bench_embedding(timer: Timer, rows: int, vocab: int, hidden: int, k: int, dtype: torch.dtype, limits: dict[str, float]) -> list[Row]:
    """The mean of K embeddings, and the table's dense gradient."""
    device = timer.device
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
    # Ids as frequent as words are: a few very often.
    draws = torch.rand(rows, k, device=device, generator=generator)
    ids = (vocab ** draws.double()).long().clamp(max=vocab) - 1
    grad = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator)
    compiled = torch.compile(lambda w, i: F.embedding(i, w).float().mean(dim=-2).to(w.dtype))
    peers: dict[str, Callable[[], torch.Tensor]] = {
        "F.embedding + mean": lambda: F.embedding(ids, weight).mean(dim=-2),
        "plain formula": lambda: plain.patch_embedding(weight, ids),
        "F.embedding_bag": lambda: F.embedding_bag(ids, weight, mode="mean"),
        "torch.compile": lambda: compiled(weight, ids),
        "ours": lambda: fused_embedding.patch_embedding(weight, ids),
    }
    both = {name: (lambda function=function: torch.autograd.grad(function(), weight, grad)) for name, function in peers.items()}
    wide = weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.embedding(ids, wide).mean(dim=-2), wide, grad.double())[0]
    errors = {
        name: (lambda function=function: relative_error(torch.autograd.grad(function(), weight, grad)[0], exact))
        for name, function in peers.items()
    }
    size = weight.element_size()
    # Rows read, means written, gradients read, the dense gradient written.
    traffic = size * hidden * (ids.numel() + rows + rows + vocab)
    title = f"patch_embedding, {rows} patches, K = {k}, V = {vocab:,}, H = {hidden}, {str(dtype).removeprefix('torch.')}"
    forwards: dict[str, Work] = dict(peers)
    found = compare(timer, title, forwards, both, traffic, 0, limits, errors)
    return [{"operator": "patch_embedding", "rows": rows, "vocab": vocab, "hidden": hidden, "patch_size": k, **row} for row in found]


def bench_linear(timer: Timer, rows: int, vocab: int, hidden: int, k: int, dtype: torch.dtype, limits: dict[str, float]) -> list[Row]:
    """The head and its loss, with both gradients."""
    device = timer.device
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device, generator=generator) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
    compiled = torch.compile(lambda h, w: short_loss(F.linear(h, w), labels))
    gradient = torch.randn(rows, vocab, device=device, dtype=dtype)

    def products() -> None:
        F.linear(states.detach(), weight.detach())
        gradient @ weight.detach()
        gradient.t() @ states.detach()

    peers: dict[str, Callable[[], torch.Tensor]] = {
        "papers' code, eager": lambda: patch_train_loss(F.linear(states, weight), labels),
        "torch.compile of lse - gather": lambda: compiled(states, weight),
    }
    if k == 1:
        others: dict[str, LinearLoss] = linear_losses(device)
        for name, function in others.items():
            peers[name] = lambda function=function: function(states, weight, labels)
    for chunk in (1024, 4096):
        if chunk < rows or chunk == 4096:
            peers[f"ours, chunks of {chunk}"] = lambda chunk=chunk: (
                fused_linear_loss.linear_multi_token_loss(states, weight, labels, chunk_rows=chunk)[0] / labels.numel()
            )
    both = {"the three products alone": products, **{name: gradient_of(function, states, weight) for name, function in peers.items()}}
    exact = exact_weight_gradient(states.detach(), weight.detach(), labels)
    errors = {
        name: (lambda function=function: relative_error(torch.autograd.grad(function(), weight)[0], exact))
        for name, function in peers.items()
    }
    title = f"linear_multi_token_loss, N = {rows}, H = {hidden}, V = {vocab:,}, K = {k}, {str(dtype).removeprefix('torch.')}"

    def evaluation(function: Callable[[], torch.Tensor]) -> Work:
        def work() -> None:
            with torch.no_grad():
                function()

        return work

    forwards = {name: evaluation(function) for name, function in peers.items()}
    found = compare(timer, title, forwards, both, 0, 6.0 * rows * vocab * hidden, limits, errors)
    return [
        {"operator": "linear_multi_token_loss", "rows": rows, "vocab": vocab, "hidden": hidden, "patch_size": k, **row} for row in found
    ]


def main() -> None:
    """Measures and prints."""
    args = parse()
    device = torch.device(args.device)
    if not native.available(device.type):
        raise SystemExit(f"the compiled operators are not to be had: {native.load_error(device.type)}")
    timer = Timer(device, args.rounds)
    limits = ceilings(timer, args.dtype)
    print(f"ceilings: copy {limits['copy_gb_per_second']:.1f} GB/s, product {limits['product_tflop_per_second']:.2f} TFLOP/s")
    name = "kernels" if len(set(args.operators)) == 3 else "-".join(["kernels", *args.operators])
    rows: list[Row] = []

    def write(tell: bool) -> None:
        write_results(name, device, {"dtype": str(args.dtype), "rounds": args.rounds, "ceilings": limits, "rows": rows}, tell)

    for n, v, k in itertools.product(args.rows, args.vocab, args.patch_sizes):
        torch._dynamo.reset()
        if "loss" in args.operators:
            rows += bench_loss(timer, n, v, k, args.dtype, limits)
        for h in args.hidden:
            if "embedding" in args.operators:
                rows += bench_embedding(timer, n, v, h, k, args.dtype, limits)
            if "linear" in args.operators:
                rows += bench_linear(timer, n, v, h, k, args.dtype, limits)
        write(tell=False)
    write(tell=True)


if __name__ == "__main__":
    main()
