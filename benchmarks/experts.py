#!/usr/bin/env python
"""Measures a block's experts, forward and backward, next to an ordinary
feed-forward layer of as many active parameters.

    python benchmarks/experts.py          8 of 64 experts and others
    python benchmarks/experts.py --tiny   a tiny shape, on any machine

The forms run in turns on the same tensors: one product for each expert (loop),
grouped products (ours), and every expert for all positions with weights of zero
(dense), which costs experts / chosen as much. Each time is divided by that of
the ordinary layer of the same round, whose width is that of the chosen experts
together. The error of output and gradients is relative to the loop in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Timer, machine, print_table, record, write_results

import megatron_patch.model.experts as layers
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.feed_forward import FeedForward
from megatron_patch.model.shape import ModelShape


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["8/2", "32/4", "64/8"], help="EXPERTS/CHOSEN (default: 8/2 32/4 64/8)")
    parser.add_argument("--hidden-size", type=int, help="H (default: 2048 on a GPU, 256 on a CPU)")
    parser.add_argument("--width", type=int, help="width of the chosen experts together (default: 6144 on a GPU, 768 on a CPU)")
    parser.add_argument("--positions", type=int, help="positions (default: 16384 on a GPU, 2048 on a CPU)")
    parser.add_argument("--rounds", type=int, help="timed runs of each form (default: 7)")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape in place of all sizes above")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if args.tiny:
        args.experts, args.hidden_size, args.width, args.positions, args.rounds = ["8/2"], 32, 64, 64, 2
    args.hidden_size, args.width = args.hidden_size or (2048 if cuda else 256), args.width or (6144 if cuda else 768)
    args.positions, args.rounds = args.positions or (16384 if cuda else 2048), args.rounds or 7
    try:
        args.pairs = [tuple(int(number) for number in text.split("/")) for text in args.experts]
        valid = all(len(pair) == 2 and 1 <= pair[1] <= pair[0] and args.width % pair[1] == 0 for pair in args.pairs)
    except ValueError:
        valid = False
    if not valid:
        parser.error(f"--experts {' '.join(args.experts)} (allowed: EXPERTS/CHOSEN, where CHOSEN divides --width, {args.width})")
    return args


def dense(layer: layers.MixtureOfExperts, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what the layer returns, by every expert for all positions."""
    rows = hidden.flatten(0, 1)
    chosen, weights = layer.router(rows, 0)
    full = torch.zeros(len(rows), layer.count, device=rows.device).scatter(1, chosen, weights)
    gate, up, down = (getattr(layer.experts, name).weight for name in ("gate", "up", "down"))
    inner = F.silu(torch.einsum("nh,eih->nei", rows, gate)) * torch.einsum("nh,eih->nei", rows, up)
    return torch.einsum("nei,ehi->nh", (inner * full[..., None]).to(rows.dtype), down).view_as(hidden)


def by_loop(layer: layers.MixtureOfExperts, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what the layer returns, by one product for each expert."""
    own, layers._has_grouped_products = layers._has_grouped_products, lambda rows, weight: False
    try:
        return layer(hidden)
    finally:
        layers._has_grouped_products = own


def main(argv: list[str] | None = None) -> int:
    """Measures each number of experts; returns 1 if the forms give different numbers."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer, tolerance = Timer(device, args.rounds), 3e-2 if dtype == torch.bfloat16 else 1e-5
    figures, wrong = [], False
    for count, chosen in args.pairs:
        torch.manual_seed(0)
        experts = ExpertShape(count, chosen, args.width // chosen)
        shape = ModelShape(1, args.hidden_size, 1, 1, args.hidden_size, args.width, 1, 1, args.positions, experts=experts)
        layer = layers.MixtureOfExperts(shape, experts)
        ordinary = FeedForward(dataclasses.replace(shape, experts=None))
        for parameter in (*layer.parameters(), *ordinary.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)
        exact = layers.MixtureOfExperts(shape, experts)
        layer, ordinary, exact = layer.to(device, dtype).eval(), ordinary.to(device, dtype), exact.to(device).eval()
        exact.load_state_dict(layer.state_dict())
        hidden = torch.randn(1, args.positions, args.hidden_size, device=device, dtype=dtype)
        grad = torch.randn_like(hidden)

        def both_ways(function: Callable[..., torch.Tensor], module: torch.nn.Module, rows: torch.Tensor, grad: torch.Tensor = grad):
            leaf = rows.detach().requires_grad_()
            out = function(leaf)
            return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], grad.to(out.dtype), allow_unused=True)]

        forms: dict[str, Callable[[], list[torch.Tensor]]] = {
            "ordinary": lambda hidden=hidden, ordinary=ordinary: both_ways(ordinary, ordinary, hidden),
            "loop": lambda hidden=hidden, layer=layer: both_ways(lambda rows: by_loop(layer, rows), layer, hidden),
            "ours": lambda hidden=hidden, layer=layer: both_ways(layer, layer, hidden),
            "dense": lambda hidden=hidden, layer=layer: both_ways(lambda rows: dense(layer, rows), layer, hidden),
        }
        expected = both_ways(lambda rows, exact=exact: by_loop(exact, rows), exact, hidden.float())
        times = timer.medians(forms)
        for name, seconds in times.items():
            error = None
            if name != "ordinary":
                error = max(
                    float((mine.float() - other).norm() / other.norm()) for mine, other in zip(forms[name](), expected, strict=True)
                )
                wrong |= not error < tolerance
            figures.append(
                record(
                    "experts",
                    experts=count,
                    chosen=chosen,
                    form=name,
                    hidden_size=args.hidden_size,
                    width=args.width,
                    positions=args.positions,
                    dtype=str(dtype).removeprefix("torch."),
                    forward_backward_ms=seconds * 1e3,
                    time_of_ordinary=seconds / times["ordinary"],
                    error=error,
                )
            )
    print_table(
        f"Experts, forward and backward, {args.positions:,} positions of {args.hidden_size}, on {device.type}",
        ["form", "experts", "ms", "time / ordinary layer", "error"],
        [
            [
                figure["form"],
                f"{figure['chosen']} of {figure['experts']}",
                f"{figure['forward_backward_ms']:.3g}",
                f"{figure['time_of_ordinary']:.2f}",
                "" if figure["error"] is None else f"{figure['error']:.1e}",
            ]
            for figure in figures
        ],
    )
    if not args.tiny:
        write_results("experts", device, {"rounds": args.rounds, "rows": figures}, info=machine(device))
    if wrong:
        print(f"forms differ from the loop in float32 by more than {tolerance}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
