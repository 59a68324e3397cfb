"""The child process of `benchmarks/kernels.py`: one peer of one operator at all sizes, or the machine's ceilings.

In: a description of the work as JSON, and the pipes of `_turns.Turns`. Out: figures, each recorded and told to the parent as soon as it is
measured. Whatever touches the GPU happens in a turn: starting CUDA and compiling in a shared one, all else alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.compile_fx  # torch's first use of it would otherwise spend seconds of a turn
import torch.nn.functional as F
from _measure import Timer, Work, ceilings, in_place_ceiling, machine, record
from _peers import OPERATORS, PEERS, Peer, Variant, given, what_of
from _turns import Message, Turns

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 3e-3}
"""How far our gradients may be from float64's, as the norm of the difference over the norm. Rounding each number once costs up to 4e-3 in
bfloat16 and 5e-4 in float16; the linear operator rounds logits, their gradient, and the products."""
_FEWEST_ROUNDS = 5
_SECONDS_A_FIGURE = 0.3


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Of a gradient: the norm of the difference over the norm."""
    return float((value.double() - exact).norm() / exact.norm())


def exact_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the loss summed over rows, each the mean over its labels: softmax - the labels' shares, in float64."""
    gradient = torch.softmax(logits.double(), dim=1)
    share = torch.full(labels.shape, -1.0 / labels.shape[1], dtype=torch.float64, device=logits.device)
    return gradient.scatter_add_(1, labels, share)


def chunks(rows: int, vocab: int) -> list[slice]:
    """Rows whose logits are 1 GB in float64."""
    size = max(1, (1 << 27) // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)]


def scaled(loss: torch.Tensor, rows: int) -> torch.Tensor:
    """What a mean loss is differentiated from, so that the gradient is the sum's: a mean's is too small a number for float16."""
    return torch.full_like(loss, float(rows))


class Loss:
    """Loss and gradient on given logits [N, V]."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, k = size["rows"], size["vocab"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.logits = torch.randn(rows, vocab, device=device, dtype=dtype, generator=generator).requires_grad_()
        self.labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
        # One read and one write of the logits is the least.
        self.bytes, self.flops = 2 * rows * vocab * self.logits.element_size(), 0.0

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Its forward pass, where there is one, and forward and backward together."""
        # What gradients overwrite: its values do not change the speed.
        given = self.logits.detach().clone().requires_grad_() if variant.overwrites or variant.whole else self.logits
        if variant.whole:
            buffer = given.detach()
            return None, lambda: variant.function(buffer, self.labels)
        return (lambda: variant.function(given, self.labels)), lambda: torch.autograd.grad(variant.function(given, self.labels), given)

    def error(self, variant: Variant) -> float:
        """Of the gradient for the logits, chunk by chunk."""
        fresh = self.logits.detach().clone().requires_grad_()
        if variant.whole:
            gradient, divisor = fresh.detach(), self.labels.shape[1]
            variant.function(gradient, self.labels)
        else:
            loss, divisor = variant.function(fresh, self.labels), 1
            gradient = torch.autograd.grad(loss, fresh, scaled(loss, len(fresh)))[0]
        wrong = size = 0.0
        for part in chunks(*self.logits.shape):
            exact = exact_gradient(self.logits[part].detach(), self.labels[part])
            wrong += float((gradient[part].double() / divisor - exact).square().sum())
            size += float(exact.square().sum())
        return (wrong / size) ** 0.5


class Embedding:
    """The mean of K embeddings, and the table's dense gradient."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, hidden, k = size["rows"], size["vocab"], size["hidden"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.weight = torch.randn(vocab, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
        # Ids as frequent as words are: a few very often.
        draws = torch.rand(rows, k, device=device, generator=generator)
        self.ids = (vocab ** draws.double()).long().clamp(max=vocab) - 1
        self.grad = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator)
        # Rows read, means written, gradients read, the dense gradient written.
        self.bytes, self.flops = self.weight.element_size() * hidden * (self.ids.numel() + rows + rows + vocab), 0.0

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Its forward pass, and forward and backward together."""

        def forward() -> torch.Tensor:
            return variant.function(self.weight, self.ids)

        return forward, lambda: torch.autograd.grad(forward(), self.weight, self.grad)

    def error(self, variant: Variant) -> float:
        """The larger one of the means' and the gradient's."""
        wide = self.weight.detach().double().requires_grad_()
        exact = F.embedding(self.ids, wide).mean(dim=-2)
        means = variant.function(self.weight, self.ids)
        of_means = relative_error(means.detach(), exact.detach())
        exact_table = torch.autograd.grad(exact, wide, self.grad.double())[0]
        of_table = relative_error(torch.autograd.grad(means, self.weight, self.grad)[0], exact_table)
        return worse(of_means, of_table)


class Linear:
    """The head and its loss, with both gradients."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, hidden, k = size["rows"], size["vocab"], size["hidden"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.states = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, device=device, generator=generator) * 0.02).to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
        self.bytes, self.flops = 0, 6.0 * rows * vocab * hidden
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Its forward pass as in an evaluation, where there is one, and forward and backward together."""
        if variant.whole:
            states, weight = self.states.detach(), self.weight.detach()
            gradient = torch.randn(len(states), len(weight), device=states.device, dtype=states.dtype)
            return None, lambda: variant.function(states, weight, gradient)

        def evaluation() -> None:
            with torch.no_grad():
                variant.function(self.states, self.weight, self.labels)

        return evaluation, lambda: torch.autograd.grad(variant.function(self.states, self.weight, self.labels), (self.states, self.weight))

    def error(self, variant: Variant) -> float | None:
        """The larger one of both gradients'; None for the products alone."""
        if variant.whole:
            return None
        loss = variant.function(self.states, self.weight, self.labels)
        found = torch.autograd.grad(loss, (self.states, self.weight), scaled(loss, len(self.states)))
        return worse(*(relative_error(value, exact) for value, exact in zip(found, self.exact(), strict=True)))

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both gradients of the summed loss in float64, made once."""
        if self._exact is None:
            wide = self.weight.detach().double()
            of_states, of_weight = torch.zeros_like(self.states, dtype=torch.float64), torch.zeros_like(wide)
            for part in chunks(len(self.states), len(wide)):
                hidden = self.states[part].detach().double()
                gradient = exact_gradient(hidden @ wide.t(), self.labels[part])
                of_states[part] = gradient @ wide
                of_weight.addmm_(gradient.t(), hidden)
            self._exact = (of_states, of_weight)
        return self._exact


def worse(*errors: float) -> float:
    """The largest one; NaN where one is."""
    return max(errors, key=lambda error: float("inf") if error != error else error)


CASES: dict[str, Callable[..., Any]] = {"loss": Loss, "embedding": Embedding, "linear": Linear}


class Child:
    """One peer at all of its sizes.

    Args:
        work: operator, peer, given (NAME=MODULE:FUNCTION or None), device, rounds, sizes, and whether there are shared turns.
        turns: of the device.
    """

    def __init__(self, work: Message, turns: Turns) -> None:
        self.work, self.turns = work, turns
        self.operator: str = work["operator"]
        self.device = torch.device(work["device"])
        self.peer: Peer = (
            given(work["given"]) if work["given"] else next(peer for peer in PEERS[self.operator] if peer.name == work["peer"])
        )
        self.failed: set[tuple[int, str]] = set()

    def fail(self, reason: str, name: str, size: Message | None = None) -> None:
        """Records and tells a failure."""
        self.turns.tell(figure=record("kernel_failed", operator=OPERATORS[self.operator], **(size or {}), peer=name, error=reason))

    def case(self, size: Message) -> Any:
        """The inputs of a size."""
        return CASES[self.operator](size, getattr(torch, size["dtype"]), self.device)

    def guarded(self, place: int, name: str, work: Callable[[], None]) -> None:
        """Runs it; an error costs this size alone, unless the device is lost."""
        try:
            work()
        except Exception as error:  # of any kind: another library's compiler, its limits, memory
            traceback.print_exc()
            self.fail(what_of(error), name, self.work["sizes"][place])
            self.failed.add((place, name))
            # Raises where an error has ended all CUDA work of this process.
            self.synchronize()
        self.release()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives memory back, which others need next."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, variants: list[Variant]) -> None:
        """Compiles: each size once, with its real shapes."""
        for place, size in enumerate(self.work["sizes"]):
            for variant in variants:

                def once(size: Message = size, variant: Variant = variant) -> None:
                    forward, both = self.case(size).works(variant)
                    both()
                    if forward is not None:
                        forward()
                    self.synchronize()

                self.guarded(place, variant.name, once)

    def measure(self, timer: Timer, case: Any, variant: Variant, size: Message, limits: Message) -> None:
        """Error, times and memory of one variant at one size: one figure."""
        error = case.error(variant)
        if error is not None and error != error:
            self.fail("its gradient holds NaN", variant.name, size)
            return
        forward, both = case.works(variant)
        times = timer.medians({"both": both} if forward is None else {"forward": forward, "both": both})
        peak = timer.peak_bytes(both)
        rate = case.flops / times["both"] / 1e12 if case.flops else case.bytes / times["both"] / 1e9
        ceiling = limits.get("product_tflop_per_second" if case.flops else "copy_gb_per_second")
        figure = record(
            "kernel",
            operator=OPERATORS[self.operator],
            **size,
            peer=variant.name,
            forward_ms=times["forward"] * 1e3 if forward is not None else None,
            forward_backward_ms=times["both"] * 1e3,
            **{"tflop_per_second" if case.flops else "gb_per_second": rate},
            share_of_ceiling=rate / ceiling if ceiling else None,
            peak_mb=peak / 1e6,
            error=error,
        )
        self.turns.tell(figure=figure)
        if self.peer.ours and error is not None and not error <= TOLERANCES[size["dtype"]]:
            self.fail(f"wrong: its error of {error:.1e} is above {TOLERANCES[size['dtype']]:.0e}", variant.name, size)

    def run(self) -> None:
        """All sizes, in their order."""
        if self.peer.ours:
            from megatron_patch.ops import native

            if (missing := native.load_error(self.device.type)) is not None:
                raise RuntimeError(f"the compiled operators are not available: {missing}")
        variants = self.peer.make(self.device.type)
        if self.work["shared"] and not self.peer.ours:
            self.turns.ask("shared")
            torch.ones(1, device=self.device).add_(1)
            self.synchronize()
            if self.peer.compiles:
                self.prepare(variants)
        limits = self.turns.ask("alone")["ceilings"]
        cuda = self.device.type == "cuda"
        timer = Timer(self.device, self.work["rounds"], _SECONDS_A_FIGURE if cuda else None, _FEWEST_ROUNDS)
        for place, size in enumerate(self.work["sizes"]):
            case: Any = None

            def make(size: Message = size) -> None:
                nonlocal case
                case = self.case(size)

            self.guarded(place, self.peer.name, make)
            for variant in variants if case is not None else []:
                if (place, variant.name) not in self.failed:

                    def measure(size: Message = size, variant: Variant = variant, case: Any = case) -> None:
                        self.measure(timer, case, variant, size, limits)

                    self.guarded(place, variant.name, measure)


def measure_ceilings(work: Message, turns: Turns) -> None:
    """Copying, adding in place to the largest logits, and a product: before the others and after them."""
    device, dtype = torch.device(work["device"]), getattr(torch, work["dtype"])
    for when, how in (("before", "alone"), ("after", "last")):
        turns.ask(how)
        timer = Timer(device, work["rounds"], _SECONDS_A_FIGURE if device.type == "cuda" else None, _FEWEST_ROUNDS)
        found = ceilings(timer, dtype, work["tiny"])
        if work["logits"] is not None:
            found |= in_place_ceiling(timer, dtype, work["logits"])
        for name, value in found.items():
            unit = "TFLOP/s" if "tflop" in name else "GB/s"
            turns.tell(figure=record("ceiling", name=name, value=value, unit=unit, when=when))
        if when == "before":
            turns.tell(ceilings=found, machine=machine(device))
        del timer
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Reads what to do from the command line."""
    work = json.loads(sys.argv[1])
    turns = Turns(int(sys.argv[2]), int(sys.argv[3]))
    # Each size is compiled for itself: the best code there is, as in a training run, whose sizes stay.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    try:
        if work["operator"] is None:
            measure_ceilings(work, turns)
        else:
            Child(work, turns).run()
    except Exception as error:  # the parent says so: this process ends
        traceback.print_exc()
        print(what_of(error), file=sys.stderr, flush=True)
        os._exit(1)
    turns.tell(done=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The next turn is given once this process has ended, so it ends at once.
    os._exit(0)


if __name__ == "__main__":
    main()
