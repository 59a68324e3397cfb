"""The child process of `benchmarks/kernels.py`: measures one peer of one operator at all sizes, or the ceilings of the machine.

In: a description of the work as JSON, and the pipes of `_device_access.DeviceAccess`. Out: figures, each recorded and sent to the parent as
soon as it is measured. A child starts CUDA and compiles with shared access to the GPU, and measures with exclusive access.
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
import torch._inductor.compile_fx  # its first import takes seconds, which would otherwise fall into the time on the device
import torch.nn.functional as F
from _device_access import DeviceAccess, Message
from _measure import Timer, Work, ceilings, in_place_ceiling, machine, record
from _peers import OPERATORS, PEERS, Peer, Variant, error_line, parse_peer

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 3e-3}
"""Largest relative error of our gradients against float64, as a ratio of norms. Rounding each number once adds up to 4e-3 in bfloat16 and
5e-4 in float16; the linear operator rounds the logits, their gradient and the products."""
_FEWEST_ROUNDS = 5
_SECONDS_A_FIGURE = 0.3


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm of the exact value."""
    return float((value.double() - exact).norm() / exact.norm())


def exact_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the float64 gradient of the loss summed over rows, where a row has the mean loss of its labels: softmax - label shares."""
    gradient = torch.softmax(logits.double(), dim=1)
    share = torch.full(labels.shape, -1.0 / labels.shape[1], dtype=torch.float64, device=logits.device)
    return gradient.scatter_add_(1, labels, share)


def chunks(rows: int, vocab: int) -> list[slice]:
    """Returns slices of rows whose float64 logits take 1 GB."""
    size = max(1, (1 << 27) // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)]


def scaled(loss: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns the output gradient of a mean loss that yields the gradient of the sum, because that of the mean underflows in float16."""
    return torch.full_like(loss, float(rows))


class Loss:
    """Loss and gradient on given logits [N, V]."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, k = size["rows"], size["vocab"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.logits = torch.randn(rows, vocab, device=device, dtype=dtype, generator=generator).requires_grad_()
        self.labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
        # At least one read and one write of the logits is necessary.
        self.bytes, self.flops = 2 * rows * vocab * self.logits.element_size(), 0.0

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Returns its forward pass, if it has a separate one, and forward and backward together."""
        # A copy that the gradient overwrites; its values do not affect the time.
        inputs = self.logits.detach().clone().requires_grad_() if variant.overwrites or variant.combined else self.logits
        if variant.combined:
            buffer = inputs.detach()
            return None, lambda: variant.function(buffer, self.labels)
        return (lambda: variant.function(inputs, self.labels)), lambda: torch.autograd.grad(variant.function(inputs, self.labels), inputs)

    def error(self, variant: Variant) -> float:
        """Returns the relative error of the gradient of the logits, computed chunk by chunk."""
        fresh = self.logits.detach().clone().requires_grad_()
        if variant.combined:
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
    """The mean of K embeddings, and the dense gradient of the table."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, hidden, k = size["rows"], size["vocab"], size["hidden"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.weight = torch.randn(vocab, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
        # Ids with frequencies like those of words: a few occur very often.
        draws = torch.rand(rows, k, device=device, generator=generator)
        self.ids = (vocab ** draws.double()).long().clamp(max=vocab) - 1
        self.grad = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator)
        # Rows read, means written, gradients read, the dense gradient written.
        self.bytes, self.flops = self.weight.element_size() * hidden * (self.ids.numel() + rows + rows + vocab), 0.0

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Returns its forward pass, and forward and backward together."""

        def forward() -> torch.Tensor:
            return variant.function(self.weight, self.ids)

        return forward, lambda: torch.autograd.grad(forward(), self.weight, self.grad)

    def error(self, variant: Variant) -> float:
        """Returns the larger relative error of the means and of the gradient."""
        wide = self.weight.detach().double().requires_grad_()
        exact = F.embedding(self.ids, wide).mean(dim=-2)
        means = variant.function(self.weight, self.ids)
        of_means = relative_error(means.detach(), exact.detach())
        exact_table = torch.autograd.grad(exact, wide, self.grad.double())[0]
        of_table = relative_error(torch.autograd.grad(means, self.weight, self.grad)[0], exact_table)
        return worse(of_means, of_table)


class Linear:
    """The head and its loss, with the gradients of hidden states and weight."""

    def __init__(self, size: Message, dtype: torch.dtype, device: torch.device) -> None:
        rows, vocab, hidden, k = size["rows"], size["vocab"], size["hidden"], size["patch_size"]
        generator = torch.Generator(device).manual_seed(0)
        self.states = torch.randn(rows, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, device=device, generator=generator) * 0.02).to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocab, (rows, k), device=device, generator=generator)
        self.bytes, self.flops = 0, 6.0 * rows * vocab * hidden
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None

    def works(self, variant: Variant) -> tuple[Work | None, Work]:
        """Returns its forward pass without gradients, if it has a separate one, and forward and backward together."""
        if variant.combined:
            states, weight = self.states.detach(), self.weight.detach()
            gradient = torch.randn(len(states), len(weight), device=states.device, dtype=states.dtype)
            return None, lambda: variant.function(states, weight, gradient)

        def evaluation() -> None:
            with torch.no_grad():
                variant.function(self.states, self.weight, self.labels)

        return evaluation, lambda: torch.autograd.grad(variant.function(self.states, self.weight, self.labels), (self.states, self.weight))

    def error(self, variant: Variant) -> float | None:
        """Returns the larger relative error of both gradients; None for the products alone."""
        if variant.combined:
            return None
        loss = variant.function(self.states, self.weight, self.labels)
        gradients = torch.autograd.grad(loss, (self.states, self.weight), scaled(loss, len(self.states)))
        return worse(*(relative_error(value, exact) for value, exact in zip(gradients, self.exact(), strict=True)))

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both float64 gradients of the summed loss, which are computed once."""
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
    """Returns the largest error, or NaN if one is NaN."""
    return max(errors, key=lambda error: float("inf") if error != error else error)


CASES: dict[str, Callable[..., Any]] = {"loss": Loss, "embedding": Embedding, "linear": Linear}


class Child:
    """Measures one peer at all of its sizes.

    Args:
        work: operator, peer, custom (NAME=MODULE:FUNCTION or None), device, rounds, sizes, and whether access can be shared.
        access: access to the device.
    """

    def __init__(self, work: Message, access: DeviceAccess) -> None:
        self.work, self.access = work, access
        self.operator: str = work["operator"]
        self.device = torch.device(work["device"])
        self.peer: Peer = (
            parse_peer(work["custom"]) if work["custom"] else next(peer for peer in PEERS[self.operator] if peer.name == work["peer"])
        )
        self.failed: set[tuple[int, str]] = set()

    def record_failure(self, reason: str, name: str, size: Message | None = None) -> None:
        """Records a failure and sends it to the parent."""
        self.access.send(figure=record("kernel_failed", operator=OPERATORS[self.operator], **(size or {}), peer=name, error=reason))

    def case(self, size: Message) -> Any:
        """Returns the inputs of a size."""
        return CASES[self.operator](size, getattr(torch, size["dtype"]), self.device)

    def catch_errors(self, index: int, name: str, work: Callable[[], None]) -> None:
        """Runs the work; an error affects only this size, unless the device is lost."""
        try:
            work()
        except Exception as error:  # of any kind: another library's compiler, its limits, or memory
            traceback.print_exc()
            self.record_failure(error_line(error), name, self.work["sizes"][index])
            self.failed.add((index, name))
            # Raises if the error has made CUDA unusable in this process.
            self.synchronize()
        self.release()

    def synchronize(self) -> None:
        """Waits until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Releases cached memory, which the next peers need."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, variants: list[Variant]) -> None:
        """Compiles each size with its real shapes."""
        for index, size in enumerate(self.work["sizes"]):
            for variant in variants:

                def once(size: Message = size, variant: Variant = variant) -> None:
                    forward, both = self.case(size).works(variant)
                    both()
                    if forward is not None:
                        forward()
                    self.synchronize()

                self.catch_errors(index, variant.name, once)

    def measure(self, timer: Timer, case: Any, variant: Variant, size: Message, limits: Message) -> None:
        """Measures error, times and memory of one variant at one size, and records them as one figure."""
        error = case.error(variant)
        if error is not None and error != error:
            self.record_failure("its gradient contains NaN", variant.name, size)
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
        self.access.send(figure=figure)
        if self.peer.ours and error is not None and not error <= TOLERANCES[size["dtype"]]:
            self.record_failure(f"wrong result: its error {error:.1e} exceeds {TOLERANCES[size['dtype']]:.0e}", variant.name, size)

    def run(self) -> None:
        """Measures all sizes in their order."""
        if self.peer.ours:
            from megatron_patch.ops import native

            if (missing := native.load_error(self.device.type)) is not None:
                raise RuntimeError(f"the compiled operators are not available: {missing}")
        variants = self.peer.make(self.device.type)
        if self.work["shared"] and not self.peer.ours:
            self.access.acquire("shared")
            torch.ones(1, device=self.device).add_(1)
            self.synchronize()
            if self.peer.compiles:
                self.prepare(variants)
        limits = self.access.acquire("exclusive")["ceilings"]
        cuda = self.device.type == "cuda"
        timer = Timer(self.device, self.work["rounds"], _SECONDS_A_FIGURE if cuda else None, _FEWEST_ROUNDS)
        for index, size in enumerate(self.work["sizes"]):
            case: Any = None

            def make(size: Message = size) -> None:
                nonlocal case
                case = self.case(size)

            self.catch_errors(index, self.peer.name, make)
            for variant in variants if case is not None else []:
                if (index, variant.name) not in self.failed:

                    def measure(size: Message = size, variant: Variant = variant, case: Any = case) -> None:
                        self.measure(timer, case, variant, size, limits)

                    self.catch_errors(index, variant.name, measure)


def measure_ceilings(work: Message, access: DeviceAccess) -> None:
    """Measures copying, adding in place to the largest logits, and a matrix product, before all peers and after them."""
    device, dtype = torch.device(work["device"]), getattr(torch, work["dtype"])
    for when, mode in (("before", "exclusive"), ("after", "last")):
        access.acquire(mode)
        timer = Timer(device, work["rounds"], _SECONDS_A_FIGURE if device.type == "cuda" else None, _FEWEST_ROUNDS)
        measured = ceilings(timer, dtype, work["tiny"])
        if work["logits"] is not None:
            measured |= in_place_ceiling(timer, dtype, work["logits"])
        for name, value in measured.items():
            unit = "TFLOP/s" if "tflop" in name else "GB/s"
            access.send(figure=record("ceiling", name=name, value=value, unit=unit, when=when))
        if when == "before":
            access.send(ceilings=measured, machine=machine(device))
        del timer
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Reads the work from the command line and does it."""
    work = json.loads(sys.argv[1])
    access = DeviceAccess(int(sys.argv[2]), int(sys.argv[3]))
    # Each size is compiled separately, as in a training run, whose sizes are constant.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    try:
        if work["operator"] is None:
            measure_ceilings(work, access)
        else:
            Child(work, access).run()
    except Exception as error:  # the parent reports it
        traceback.print_exc()
        print(error_line(error), file=sys.stderr, flush=True)
        os._exit(1)
    access.send(done=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The parent grants the next access when this process has ended, so end it at once.
    os._exit(0)


if __name__ == "__main__":
    main()
