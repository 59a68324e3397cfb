"""Muon: momentum that is orthogonalized, for the matrices of the blocks; AdamW steps all other parameters.

In: parameter groups, of which one holds the hidden matrices, and options. Out: an optimizer that is exact under every layout. DeepSpeed
gives an optimizer flat partitions, from which no rank could compute the update of a matrix. So momentum and weights stay where they are,
and the engine attaches the optimizer to the ranks that hold the same layers (`attach`): then each step collects every matrix on one rank
(`MatrixExchange`).

For a hidden matrix W [R, C] with gradient G (clipped), learning rate η, weight decay λ and momentum β (Jordan 2024; scale and decay of
arXiv 2502.16982):

    M ← β·M + (1 - β)·G
    W ← (1 - η·λ)·W - η·s·orthogonalize(β·M + (1 - β)·G)        s = 0.2·√max(R, C)

No class or attribute here has the name that DeepSpeed's own Muon is recognized by, since its hooks would change the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.config.options import MuonScaleMode, ScheduleOptions
from megatron_patch.optimizers.adamw import make_adamw
from megatron_patch.optimizers.exchange import MatrixExchange
from megatron_patch.optimizers.groups import HIDDEN
from megatron_patch.optimizers.newton_schulz import newton_schulz
from megatron_patch.optimizers.ownership import WAVE_LIMIT, MatrixSpan
from megatron_patch.optimizers.state import probed_state

_MOMENTUM = "momentum"


def update_scale(shape: tuple[int, int], mode: MuonScaleMode, extra: float) -> float:
    """Returns the factor of the orthogonalized momentum of a matrix.

    Args:
        shape: (rows, columns), which are (outputs, inputs) of a linear layer.
        mode: "spectral": √max(rows, columns), which gives all elements the same root mean square; "unit_rms_norm": √(rows/columns);
            "shape_scaling": √max(1, rows/columns).
        extra: a further factor; about 0.2 is the root mean square of AdamW's update (arXiv 2502.16982).
    """
    rows, columns = shape
    square = {"spectral": max(rows, columns), "unit_rms_norm": rows / columns, "shape_scaling": max(1.0, rows / columns)}[mode]
    return extra * math.sqrt(square)


class OrthogonalizedMomentum(torch.optim.Optimizer):
    """Muon for groups marked `HIDDEN`; see the first lines of this file.

    Args:
        groups: all parameter groups.
        rest: the optimizer of the groups that are not marked, made of the same group dictionaries.
        options: momentum, scale, Newton-Schulz steps.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rest: torch.optim.Optimizer, options: ScheduleOptions) -> None:
        super().__init__(groups, {"lr": options.lr, "weight_decay": options.weight_decay})
        self._rest, self._options = rest, options
        rest.state = self.state
        self._exchanges: dict[int, MatrixExchange] = {}

    @property
    def exchanges(self) -> list[MatrixExchange]:
        """The exchanges of the tensors that are stepped together, in the order in which they were attached."""
        return list(self._exchanges.values())

    def attach(
        self,
        units: Sequence[tuple[Sequence[torch.Tensor], Sequence[MatrixSpan]]],
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype,
        wave_limit: int = WAVE_LIMIT,
    ) -> None:
        """Attaches the optimizer to the ranks that hold the same layers; all of them must call it, with as many units.

        Args:
            units: for each list of tensors that one call of `step` finds in a marked group, these tensors and the spans that they hold.
            group: the ranks; None: all.
            device: where matrices are orthogonalized.
            dtype: dtype in which they are sent and orthogonalized.
            wave_limit: see `MatrixExchange`.
        """
        self._exchanges = {
            id(tensors[0]): MatrixExchange(tensors, spans, group, device, dtype, wave_limit) for tensors, spans in units if tensors
        }

    def new_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Returns the state of a tensor before the first step: momentum for hidden matrices, else that of the other optimizer."""
        if any(tensor is other for exchange in self._exchanges.values() for other in exchange.tensors):
            return {_MOMENTUM: torch.zeros_like(tensor)}
        return probed_state(self._rest, tensor)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps all groups that have parameters now; ZeRO fills only some of them at a time. Gradients of hidden matrices are overwritten.

        Args:
            closure: not supported; None.
        """
        assert closure is None
        groups = [group for group in self.param_groups if group["params"]]
        if others := [group for group in groups if HIDDEN not in group]:
            own, self._rest.param_groups = self._rest.param_groups, others
            self._rest.step()
            self._rest.param_groups = own
        for group in groups:
            if HIDDEN in group:
                self._step_hidden(group)

    def _step_hidden(self, group: dict[str, Any]) -> None:
        options, tensors = self._options, group["params"]
        exchange = self._exchanges[id(tensors[0])]
        assert all(mine is known for mine, known in zip(tensors, exchange.tensors, strict=True))
        for tensor in tensors:
            if _MOMENTUM not in self.state[tensor]:
                self.state[tensor][_MOMENTUM] = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in tensors]
        momenta = [self.state[tensor][_MOMENTUM] for tensor in tensors]
        torch._foreach_lerp_(momenta, gradients, 1 - options.muon_momentum)
        if options.muon_nesterov:
            torch._foreach_lerp_(gradients, momenta, options.muon_momentum)
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
        sources = gradients if options.muon_nesterov else momenta
        exchange.add_mapped([s.view(-1) for s in sources], [t.view(-1) for t in tensors], self.update, -group["lr"])

    def update(self, matrices: torch.Tensor) -> torch.Tensor:
        """Returns the update of matrices [N, rows, columns], before the learning rate."""
        options = self._options
        scale = update_scale((matrices.shape[-2], matrices.shape[-1]), options.muon_scale_mode, options.muon_extra_scale_factor)
        return newton_schulz(matrices, options.muon_coefficient_type, options.muon_num_ns_steps) * scale


def make_muon(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> OrthogonalizedMomentum:
    """Returns Muon for the groups marked `HIDDEN` and AdamW for the others.

    Args:
        groups: parameter groups, each with its own `weight_decay`.
        options: settings of both.
        offloaded: whether the optimizer steps in host memory; matrices are orthogonalized on the device nevertheless.
    """
    rest = make_adamw([group for group in groups if HIDDEN not in group], options, offloaded)
    return OrthogonalizedMomentum(groups, rest, options)
