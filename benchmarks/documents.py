#!/usr/bin/env python
"""Measures attention inside documents, forward and backward, next to the dense
mask and to plain causal attention.

    python benchmarks/documents.py          T = 1,024 to 8,192 and several
                                            lengths of documents
    python benchmarks/documents.py --window 1024 --mixes one
                                            a sliding window, where each sample
                                            is one document
    python benchmarks/documents.py --tiny   a tiny shape, on any machine

The peers run in turns on the same tensors: plain causal attention, in which a
sample is one document; the dense mask of T x T, which is made before, once for
all blocks of a model; and the operator of this program. Each time is divided by
that of plain causal attention of the same round. The error of output and
gradients is relative to the dense mask in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from _measure import Timer, machine, print_table, record, write_results

from megatron_patch.model.attention import repeat_groups, supports_grouped_queries
from megatron_patch.ops.attention_kernels import band
from megatron_patch.ops.documents_attention import documents_attention, documents_from_ids, documents_of_samples

MIXES = {
    "128 each": 128.0,
    "512 each": 512.0,
    "web text": (400.0, 1.0),
    "short texts": (25.0, 1.0),
    "one": 1e9,
}
"""Lengths of documents in positions: all the same, or a log-normal distribution of (median, standard deviation of the logarithm)."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="T (default: 1024 2048 4096 8192)")
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES), help="lengths of documents (default: all)")
    parser.add_argument("--window", type=int, help="positions of a window, for the dense mask and the operator (default: none)")
    parser.add_argument("--samples", type=int, default=1, help="B, samples (default: 1)")
    parser.add_argument("--heads", type=int, help="number of heads (default: 32 on a GPU, 8 on a CPU)")
    parser.add_argument("--groups", type=int, help="number of query groups (default: a quarter of the heads)")
    parser.add_argument("--head-size", type=int, help="size of a head (default: 128 on a GPU, 64 on a CPU)")
    parser.add_argument("--rounds", type=int, help="timed runs of each peer (default: 7 on a GPU, 3 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape in place of all sizes above")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if args.tiny:
        args.seq_length, args.heads, args.groups, args.head_size, args.rounds = [256], 4, 2, 16, 3
    args.heads = args.heads or (32 if cuda else 8)
    args.groups = args.groups or max(1, args.heads // 4)
    args.head_size, args.rounds = args.head_size or (128 if cuda else 64), args.rounds or (7 if cuda else 3)
    if args.window is not None and args.window < 1:
        parser.error(f"--window {args.window} (allowed: from 1)")
    if args.heads % args.groups:
        parser.error(f"--groups {args.groups} (allowed: a divisor of --heads, {args.heads})")
    return args


def document_ids(mix: str, samples: int, length: int) -> np.ndarray:
    """Returns the number of each position's document, [samples, length], the same in every call."""
    draw, lengths = np.random.default_rng(1), MIXES[mix]
    rows = []
    for _ in range(samples):
        if isinstance(lengths, float):
            sizes = np.full(length, int(lengths))
        else:
            sizes = np.maximum(1, draw.lognormal(np.log(lengths[0]), lengths[1], length)).astype(np.int64)
        rows.append(np.searchsorted(np.cumsum(sizes), np.arange(length), side="right"))
    return np.stack(rows)


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Returns the largest difference over tensors, each relative to the norm of the expected one."""
    return max(float((mine.float() - other).norm() / other.norm()) for mine, other in zip(found, expected, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measures each length and mix; returns 1 if the operator gives other numbers than the dense mask."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer, tolerance = Timer(device, args.rounds), 2e-2 if dtype == torch.bfloat16 else 1e-5
    grouped = {masked: supports_grouped_queries(device.type, dtype, args.head_size, masked) for masked in (False, True)}
    figures, wrong = [], False

    def causal(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        gqa = grouped[mask is not None] or queries.dtype != dtype
        if not gqa:
            keys, values = (repeat_groups(tensor, args.heads) for tensor in (keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)

    for length in args.seq_length:
        shapes = [(args.samples, length, heads, args.head_size) for heads in (args.heads, args.groups, args.groups, args.heads)]
        *inputs, gradient = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes)
        for mix in args.mixes:
            ids = document_ids(mix, args.samples, length)
            found = documents_from_ids(ids)
            if found is None and args.window is None:
                continue  # plain causal attention itself
            documents = documents_of_samples(args.samples, length, device) if found is None else found.to(device)
            on_device = torch.from_numpy(ids).to(device)
            mask = (on_device[:, None, :, None] == on_device[:, None, None]) & band(length, length, args.window, device)

            def both_ways(attend: Callable[..., torch.Tensor], *given: torch.Tensor) -> list[torch.Tensor]:
                leaves = [tensor.detach().requires_grad_() for tensor in given[:3]]
                out = attend(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]

            ways: dict[str, Callable[..., torch.Tensor]] = {
                "plain causal": lambda q, k, v: causal(q, k, v, None),
                "dense mask": lambda q, k, v, mask=mask: causal(q, k, v, mask),
                "ours": lambda q, k, v, documents=documents: documents_attention(q, k, v, documents, args.window),
            }
            given = (*inputs, gradient)
            error = relative_error(both_ways(ways["ours"], *given), both_ways(ways["dense mask"], *(tensor.float() for tensor in given)))
            wrong |= not error < tolerance
            work = {name: lambda attend=attend, given=given: both_ways(attend, *given) for name, attend in ways.items()}
            times = timer.medians(work)
            for name, seconds in times.items():
                kept = mask.nbytes if name == "dense mask" else 0
                figure = {"seq_length": length, "mix": mix, "peer": name, "window": args.window}
                figure |= {
                    "documents": len(documents.host_bounds) - 1,
                    "longest": int(documents.longest),
                    "dtype": str(dtype).removeprefix("torch."),
                }
                figure |= {"heads": args.heads, "groups": args.groups, "head_size": args.head_size, "samples": args.samples}
                figure |= {"forward_backward_ms": seconds * 1e3, "speed_of_plain": times["plain causal"] / seconds}
                figure |= {"peak_mb": (kept + timer.peak_bytes(work[name])) / 1e6, "error": error if name == "ours" else None}
                figures.append(record("documents", **figure))
    title = f"Attention, forward and backward, {args.heads}/{args.groups} heads of {args.head_size}, on {device.type}"
    print_table(
        title,
        ["peer", "T", "documents", "longest", "ms", "speed / plain", "peak MB", "error"],
        [
            [
                f"{figure['peer']}, {figure['mix']}",
                *(str(figure[key]) for key in ("seq_length", "documents", "longest")),
                f"{figure['forward_backward_ms']:.3g}",
                f"{figure['speed_of_plain']:.2f}",
                f"{figure['peak_mb']:.1f}",
                "" if figure["error"] is None else f"{figure['error']:.1e}",
            ]
            for figure in figures
        ],
    )
    if not args.tiny:
        write_results("documents", device, {"rounds": args.rounds, "rows": figures}, info=machine(device))
    if wrong:
        print(f"the operator differs from the dense mask by more than {tolerance}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
