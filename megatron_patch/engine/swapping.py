"""Access to master weights and optimizer state that ZeRO 3 keeps on NVMe: one sub-group at a time is swapped in, and swapped out again.

DeepSpeed steps over sub-groups of the parameters. Between steps the tensors of a sub-group on NVMe exist but are empty. Code that reads
or sets them (checkpoints, initial weights, the switch) uses `SubGroups` and goes through the sub-groups in their order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.state import ensure_state, state_kinds


def require_async_io() -> None:
    """Loads DeepSpeed's operator for NVMe, provided that it is built already.

    Raises:
        ConfigError: the operator is not built, or cannot be loaded.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder

    def is_built(name: str) -> bool:
        if installed_ops.get(name) and accelerator_name == get_accelerator()._name:
            return True
        from torch.utils.cpp_extension import _get_build_directory

        return os.path.exists(os.path.join(_get_build_directory(name, verbose=False), f"{name}.so"))

    problem = "is not built; DeepSpeed would compile it while training starts"
    if is_built(AsyncIOBuilder.NAME) and is_built(PinMemoryBuilder.NAME):
        try:
            AsyncIOBuilder().load()
            return
        except (ImportError, OSError, RuntimeError) as error:
            problem = f"cannot be loaded: {error}"
    raise ConfigError(
        f"--deepspeed_config offloads to nvme, but DeepSpeed's operator async_io {problem}",
        "offload to nvme if DeepSpeed is installed with this operator; offload to cpu always",
        "apt-get install libaio-dev && LDFLAGS='-Wl,--no-as-needed -laio' DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 pip install "
        "--no-build-isolation --force-reinstall --no-deps --no-cache-dir deepspeed==0.19.8, or use device cpu",
    )


class SubGroups:
    """The sub-groups of a ZeRO 3 optimizer, of which at most one is in memory; at the end of the `with` block it is swapped out.

    Args:
        zero: DeepSpeed's ZeRO 3 optimizer.
        optimizer: the inner optimizer.
        written: whether the caller changes the tensors, so that they must be written back to NVMe.
    """

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer, written: bool) -> None:
        self._zero, self._optimizer, self._written = zero, optimizer, written
        self._current: int | None = None

    def __enter__(self) -> SubGroups:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._swap_out()

    def of(self, parameter: Any) -> int:
        """Returns the number of the sub-group that contains a parameter."""
        return int(self._zero.grad_position[self._zero.get_param_id(parameter)][0])

    def tensors(self, group: int) -> dict[str, torch.Tensor]:
        """Returns weight and optimizer state of a sub-group, flat, float32; valid until the tensors of another sub-group are requested."""
        if group != self._current:
            self._swap_out()
            if self._zero._swappable_optimizer_subgroup(group):
                self._zero._optimizer_states_and_gradient_swap_in(group)
            self._current = group
        state = self._state(group)
        return {"weight": self._zero.fp32_partitioned_groups_flat[group].detach(), **{kind: state[kind] for kind in state_kinds(state)}}

    def _state(self, group: int) -> dict[str, Any]:
        return ensure_state(self._optimizer, self._zero.fp32_partitioned_groups_flat[group])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the tensors of each sub-group in turn."""
        return map(self.tensors, range(len(self._zero.fp32_partitioned_groups_flat)))

    def views(self, group: int, offset: int, numel: int) -> Mapping[str, torch.Tensor]:
        """Returns a mapping from kind to a span of a sub-group's tensors, which are swapped in when they are looked up."""
        return _Views(self, group, offset, numel)

    def _swap_out(self) -> None:
        group, self._current = self._current, None
        if group is None:
            return
        zero = self._zero
        if self._written and zero.fp16_partitioned_groups_flat[group] is None:
            # The weights of the forward pass are on NVMe, too.
            zero._partitioned_params_swap_out(group)
        if zero._swappable_optimizer_subgroup(group):
            if self._written:
                zero._optimizer_states_and_gradient_swap_out(group)
            else:
                zero._release_swap_buffers(group)


class _Views(Mapping[str, torch.Tensor]):
    def __init__(self, groups: SubGroups, group: int, offset: int, numel: int) -> None:
        self._groups, self._span = groups, (group, offset, numel)

    def __getitem__(self, kind: str) -> torch.Tensor:
        group, offset, numel = self._span
        return self._groups.tensors(group)[kind].view(-1).narrow(0, offset, numel)

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups.tensors(self._span[0]))

    def __len__(self) -> int:
        return len(self._groups.tensors(self._span[0]))
