"""Master weights and moments that ZeRO 3 keeps on NVMe: brought into memory one sub-group at a time, and sent back.

DeepSpeed steps over sub-groups of the parameters. Between steps the tensors of a sub-group on NVMe are there by name but empty, so whoever
reads or sets them (checkpoints, initial weights, the switch of stages) does it through `SubGroups`, in the order of the sub-groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from megatron_patch.engine.optimizer import MOMENTS, ensure_moments
from megatron_patch.errors import ConfigError


def require_async_io() -> None:
    """Loads DeepSpeed's operator for NVMe where that compiles nothing.

    Raises:
        ConfigError: it was not built with DeepSpeed, nor at an earlier time, or does not load.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder

    def is_built(name: str) -> bool:
        if installed_ops.get(name) and accelerator_name == get_accelerator()._name:
            return True
        from torch.utils.cpp_extension import _get_build_directory

        return os.path.exists(os.path.join(_get_build_directory(name, verbose=False), f"{name}.so"))

    problem = "is not built, and would be compiled while training starts"
    if is_built(AsyncIOBuilder.NAME) and is_built(PinMemoryBuilder.NAME):
        try:
            AsyncIOBuilder().load()
            return
        except (ImportError, OSError, RuntimeError) as error:
            problem = f"does not load: {error}"
    raise ConfigError(
        f"--deepspeed_config offloads to nvme, and DeepSpeed's operator async_io {problem}",
        "offload to nvme where DeepSpeed was installed with that operator; offload to the cpu anywhere",
        "apt-get install libaio-dev && LDFLAGS='-Wl,--no-as-needed -laio' DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 pip install "
        "--no-build-isolation --force-reinstall --no-deps --no-cache-dir deepspeed==0.19.8, or use device cpu",
    )


class SubGroups:
    """A ZeRO 3 optimizer's sub-groups, of which at most one is in memory; closing it sends the last one back.

    Args:
        zero: DeepSpeed's optimizer of ZeRO 3.
        optimizer: the one inside.
        written: tensors are changed, and what is on NVMe has to change with them.
    """

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer, written: bool) -> None:
        self._zero, self._optimizer, self._written = zero, optimizer, written
        self._inside: int | None = None

    def __enter__(self) -> SubGroups:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._send_back()

    def of(self, parameter: Any) -> int:
        """The sub-group of a parameter."""
        return int(self._zero.grad_position[self._zero.get_param_id(parameter)][0])

    def tensors(self, group: int) -> dict[str, torch.Tensor]:
        """Weights and moments of a sub-group, flat, float32; live until another one is asked for."""
        if group != self._inside:
            self._send_back()
            if self._zero._swappable_optimizer_subgroup(group):
                self._zero._optimizer_states_and_gradient_swap_in(group)
            self._inside = group
        flat = self._zero.fp32_partitioned_groups_flat[group]
        state = ensure_moments(self._optimizer, flat)
        return {"weight": flat.detach(), **{name: state[name] for name in MOMENTS}}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each sub-group in turn."""
        return map(self.tensors, range(len(self._zero.fp32_partitioned_groups_flat)))

    def views(self, group: int, offset: int, numel: int) -> Mapping[str, torch.Tensor]:
        """Spans of a sub-group's tensors, made when they are looked up."""
        return _Views(self, group, offset, numel)

    def _send_back(self) -> None:
        group, self._inside = self._inside, None
        if group is None:
            return
        zero = self._zero
        if self._written and zero.fp16_partitioned_groups_flat[group] is None:
            # The weights that the model computes with are on NVMe, too.
            zero._partitioned_params_swap_out(group)
        if zero._swappable_optimizer_subgroup(group):
            if self._written:
                zero._optimizer_states_and_gradient_swap_out(group)
            else:
                zero._release_swap_buffers(group)


class _Views(Mapping[str, torch.Tensor]):
    def __init__(self, groups: SubGroups, group: int, offset: int, numel: int) -> None:
        self._groups, self._place = groups, (group, offset, numel)

    def __getitem__(self, kind: str) -> torch.Tensor:
        group, offset, numel = self._place
        return self._groups.tensors(group)[kind].view(-1).narrow(0, offset, numel)

    def __iter__(self) -> Iterator[str]:
        return iter(("weight", *MOMENTS))

    def __len__(self) -> int:
        return 1 + len(MOMENTS)
