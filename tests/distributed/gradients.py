"""The gradient that reaches the optimizer, compared with a float64 sum of what the micro-batches' backward passes return.

`checked_program` is the training program with this measurement in it, and `gradient_errors` reads what the ranks found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.runs import Run, start_program

FLOAT32_ERROR = 1e-6
"""Largest error relative to the norm of a gradient that rounding to float32 explains; bfloat16 has errors of 1e-3, float16 of 1e-4."""


class _Check:
    """Sums the gradients of this rank's micro-batches in float64, and compares the global mean of the sums with each step's gradient.

    Args:
        engine: the engine that computes them.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.worst: dict[str, float] = {}
        self.groups = engine._optimizer.param_groups
        shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for parameter, name in engine._names.items()}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        for parameter, name in engine._names.items():
            # Called once a backward pass, before DeepSpeed's hooks and before the gradient is added to any other.
            parameter.register_hook(lambda gradient, name=name: self._add(name, gradient))

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self.sums[name] += gradient.detach().double()

    def reduced(self) -> dict[str, torch.Tensor]:
        """Returns the gradients of the global batch, float64, and starts with the next step."""
        engine, result = self.engine, {}
        scale = 1 if engine.config.sums_gradients else engine.grid.data_parallel_size
        scale *= getattr(engine._engine.optimizer, "loss_scale", 1.0)
        for name, total in self.sums.items():
            if engine.grid.data_parallel_size > 1:
                dist.all_reduce(total, group=engine._groups.data)
            if engine._model_shape.tie_embeddings and name == "embedding.word.weight" and engine._groups.embedding is not None:
                dist.all_reduce(total, group=engine._groups.embedding)
            result[name] = total / scale
            self.sums[name] = torch.zeros_like(total)
        return result

    def compare(self, expected: dict[str, torch.Tensor]) -> None:
        """Compares what the optimizer is about to use; ZeRO may fill and step one group of parameters after the other."""
        from megatron_patch.engine.fragments import locate

        engine, optimizer = self.engine, self.engine._optimizer
        shown, optimizer.param_groups = optimizer.param_groups, self.groups  # ZeRO 1 and 2 hide all groups but one
        for parameter, name in engine._names.items():
            located = locate(engine._engine, optimizer, parameter, None)
            if located is None or located[0].grad is None or located[3] <= 0:
                continue
            flat, offset, start, numel = located
            found = flat.grad.detach().view(-1)[offset : offset + numel].double()
            wanted = expected[name].view(-1)[start : start + numel]
            error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
            self.worst[name] = max(self.worst.get(name, 0.0), error)
        optimizer.param_groups = shown


def checked_program(argv: list[str], program: Callable[[list[str]], int] = start_program) -> int:
    """Runs the program on one rank and writes `SAVE/gradients-RANK.json`: name of a parameter -> largest relative error over all steps."""
    from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine

    checks: list[_Check] = []
    build, gated = DeepSpeedEngine.__init__, DeepSpeedEngine._gated

    def checked_build(self: Any, *args: Any) -> None:
        build(self, *args)
        checks.append(_Check(self))

    @contextmanager
    def checked_step(self: Any, *args: Any) -> Iterator[Any]:
        expected: list[dict[str, torch.Tensor]] = []

        def compare(*_: Any) -> None:
            if not expected:
                expected.append(checks[0].reduced())
            checks[0].compare(expected[0])

        hook = self._optimizer.register_step_pre_hook(compare)
        try:
            with gated(self, *args) as outcome:
                yield outcome
        finally:
            hook.remove()

    DeepSpeedEngine.__init__, DeepSpeedEngine._gated = checked_build, checked_step  # type: ignore[method-assign]
    code = program(argv)
    save = Path(argv[argv.index("--save") + 1])
    (save / f"gradients-{checks[0].engine.grid.rank}.json").write_text(json.dumps(checks[0].worst))
    return code


def float16_program(argv: list[str]) -> int:
    """Runs the program on one rank with `--fp16`, which it refuses on CPUs."""
    from deepspeed.accelerator import get_accelerator

    from megatron_patch.config.resolve import load_config
    from megatron_patch.engine.distributed import init_distributed
    from megatron_patch.training.faults.stop_requests import StopRequests
    from megatron_patch.training.pretrain import make_engine_config, make_watchdog
    from megatron_patch.training.trainer import Trainer

    get_accelerator().is_fp16_supported = lambda: True
    run = load_config(argv, int(os.environ["WORLD_SIZE"]))
    with make_watchdog(run) as watchdog:
        device, stops = init_distributed(1), StopRequests(run.options.safety)
        with Trainer(run, make_engine_config(run), device, stops, watchdog, ()) as trainer:
            return int(trainer.train())


def checked_float16_program(argv: list[str]) -> int:
    """Runs `float16_program` with the measurement of `checked_program`."""
    return checked_program(argv, float16_program)


def gradient_errors(run: Run, ranks: int) -> dict[str, float]:
    """Returns the largest relative error of the gradient of each parameter over all ranks and steps."""
    worst: dict[str, float] = {}
    for rank in range(ranks):
        for name, error in json.loads((run.folder / f"gradients-{rank}.json").read_text()).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst
