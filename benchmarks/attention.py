#!/usr/bin/env python
"""Measures causal attention by backend, forward and backward.

    python benchmarks/attention.py          a micro-batch of the 1.3B shape:
                                            B = 8, 16 heads of 128, T = 2048
    python benchmarks/attention.py --tiny   a tiny shape, on any machine

FLOPs are those of 7 matrix products (2 forward, 5 backward) over half of the
pairs of positions. The result names the backend that torch chooses, which is
recognized by its kernels, and the ceilings of the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Timer, ceilings, print_table, record
from _profile import Profile
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="B, samples (default: 8)")
    parser.add_argument("--heads", type=int, default=16, help="number of heads (default: 16)")
    parser.add_argument("--seq-length", type=int, default=2048, help="T, positions per sample (default: 2048)")
    parser.add_argument("--head-size", type=int, default=128, help="size of a head (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each backend (default: 7)")
    parser.add_argument("--when", default="after", help="label of the ceilings: before or after other measurements")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.heads, args.seq_length, args.head_size, args.rounds = 2, 2, 64, 16, 3
    return args


def kernels(device: torch.device, work: Callable[[], None]) -> set[str]:
    """Returns the names of the kernels that the work runs."""
    work()
    profile = Profile(device)
    profile.start()
    work()
    profile.stop()
    return {row["name"] for row in profile.figures(top=1000)["rows"]}


def main(argv: list[str] | None = None) -> int:
    """Measures each backend; returns 1 if none works."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        print("no GPU found; give --tiny to run on a CPU", file=sys.stderr)
        return 2
    timer = Timer(device, args.rounds)
    dtype, shape = torch.bfloat16, (args.samples, args.heads, args.seq_length, args.head_size)
    queries, keys, values = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def attend() -> None:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        torch.autograd.grad(out, (queries, keys, values), gradient)

    def attend_by(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            attend()

    chosen = kernels(device, attend)
    flops = 7 * args.samples * args.heads * args.seq_length**2 * args.head_size
    lines, worked = [], 0
    for name, backend in BACKENDS.items():
        figure = {"backend": name, "dtype": "bfloat16", "shape": list(shape)}
        try:
            is_chosen = bool(chosen) and kernels(device, lambda backend=backend: attend_by(backend)) == chosen  # type: ignore[misc]
            seconds = timer.medians({name: lambda backend=backend: attend_by(backend)})[name]  # type: ignore[misc]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            record("attention", **figure, forward_backward_ms=None, tflop_per_second=None, chosen=False, error=reason)
            lines.append([name, "-", "-", reason[:80]])
            continue
        worked += 1
        rate = flops / seconds / 1e12
        record("attention", **figure, forward_backward_ms=seconds * 1e3, tflop_per_second=rate, chosen=is_chosen)
        lines.append([name, f"{seconds * 1e3:.3f}", f"{rate:.4g}", "chosen by torch" if is_chosen else ""])
    print_table(f"Causal attention, forward and backward, {shape}, bfloat16", ["backend", "ms", "TFLOP/s", ""], lines)
    print("kernels that torch chooses: " + "; ".join(sorted(chosen))[:600])
    limits = ceilings(timer, dtype)
    for name, value in limits.items():
        record("ceiling", name=name, value=value, unit="GB/s" if "gb" in name else "TFLOP/s", when=args.when)
    print({name: round(value, 1) for name, value in limits.items()})
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())
