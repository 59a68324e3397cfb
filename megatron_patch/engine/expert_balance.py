"""Balances the load of experts over the global batch, whatever ranks and micro-batches it is divided into.

In: the routers of this rank's layers, which count their choices. Out: factors of the balance terms before a step; after it the new loads
and biases, equal on all ranks, and `ExpertLoad` for the metrics. Counts are whole numbers, so the order in which ranks are summed does not
matter. A rejected or skipped step changes nothing, and evaluation counts nothing. Full recomputation counts each choice twice, which
leaves all shares as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch.engine.interface import ExpertLoad
from megatron_patch.model.expert_balance import RouterBalance
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.groups import Groups
from megatron_patch.stages import NO_BALANCE, Stage

LOAD_DECAY = 0.9
"""Share of the earlier load in the new one."""


class ExpertBalancer:
    """The balance of all experts of a rank's layers.

    Args:
        model: this rank's part of the model.
        shape: shape of the full model.
        groups: this rank's coordinates and process groups.
        device: this rank's device.
    """

    def __init__(self, model: nn.Module, shape: ModelShape, groups: Groups, device: torch.device) -> None:
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, RouterBalance)}
        self._shape, self._groups, self._device = shape, groups, device
        self._settings, self._positions = NO_BALANCE, 1
        self._blocks = torch.tensor([int(name.split(".")[1]) for name in self._routers], dtype=torch.int64, device=device)

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """The loads and biases of this rank's layers by name, float32 [experts], which a checkpoint keeps."""
        return {f"{name}.{key}": tensor for name, router in self._routers.items() for key, tensor in router.state_dict().items()}

    def start_stage(self, stage: Stage) -> None:
        """Applies a stage's coefficients and batch."""
        settings = self._settings = stage.expert_balance
        self._positions = stage.positions_per_step
        for router in self._routers.values():
            router.adds_gradient = settings.aux_loss_coeff > 0 or settings.z_loss_coeff > 0

    def start_step(self, scale: float) -> None:
        """Prepares a step.

        Args:
            scale: what the engine multiplies a sum over the positions of all ranks by, so that its gradient is that of the sum.
        """
        settings = self._settings
        for router in self._routers.values():
            # Filled, not copied: a copy from the host would wait for the device, once for each block.
            router.factors[0].fill_(settings.aux_loss_coeff * len(router.load) * (scale / self._positions))
            router.factors[1].fill_(settings.z_loss_coeff * (scale / self._positions))

    @torch.no_grad()
    def finish_step(self, taken: bool) -> tuple[ExpertLoad, ...]:
        """Updates loads and biases after a step, and returns the load of each block with experts, in order; all ranks must call it.

        Args:
            taken: whether the step changed the weights; otherwise loads and biases stay as they are.
        """
        if (experts := self._shape.experts) is None:
            return ()
        routers = self._routers.values()
        rows = [torch.cat([router.counts.double(), router.entropy]) for router in routers]
        sums = torch.stack(rows) if rows else torch.zeros(0, experts.count + 2, dtype=torch.float64, device=self._device)
        if self._groups.grid.data_parallel_size > 1 and rows:
            torch.distributed.all_reduce(sums, group=self._groups.data)
        for router, row in zip(routers, sums, strict=True):
            counts = row[:-2]
            if taken:
                share = counts / counts.sum()
                router.load.copy_(LOAD_DECAY * router.load.double() + (1.0 - LOAD_DECAY) * share)
                if router.bias is not None:
                    router.bias += self._settings.bias_update_rate * torch.sign(counts.mean() - counts).float()
            router.counts.zero_()
            router.entropy.zero_()
        return self._loads(sums)

    def _loads(self, sums: torch.Tensor) -> tuple[ExpertLoad, ...]:
        """Returns the loads of all pipeline ranks' blocks, from [choices of each expert, entropy, positions] of this rank's, float64."""
        counts, entropy, positions = sums[:, :-2], sums[:, -2], sums[:, -1]
        largest = counts.amax(1) / counts.mean(1)
        table = torch.zeros(self._shape.num_layers, 4, dtype=torch.float64, device=self._device)
        if self._routers:
            table[self._blocks] = torch.stack([torch.ones_like(largest), largest, (counts == 0).sum(1), entropy / positions], dim=1)
        if self._groups.pipeline is not None:
            torch.distributed.all_reduce(table, group=self._groups.pipeline)
        rows = enumerate(table.tolist())
        return tuple(ExpertLoad(block, largest, int(dead), entropy) for block, (has, largest, dead, entropy) in rows if has)
