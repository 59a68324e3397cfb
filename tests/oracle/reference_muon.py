"""Muon of torch in place of the product's: what one process that holds whole matrices computes.

In: the parameter groups of a run on one process. Out: an optimizer whose step on hidden matrices is the function of `torch.optim.Muon`, and
whose step on all other parameters is `torch.optim.AdamW`. Torch always orthogonalizes in bfloat16, whose rounding would hide errors of
1e-5; here the same source runs without that conversion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import _muon

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.optimizers.groups import HIDDEN


def _function_in_float32() -> Any:
    """Returns torch's Muon, whose Newton-Schulz steps keep the dtype of the gradient."""
    names: dict[str, Any] = {**vars(_muon)}
    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    # A copy, because the division after it works in place.
    assert source.count("grad.bfloat16()") == 1
    exec(source.replace("grad.bfloat16()", "grad.clone()"), names)
    exec(inspect.getsource(_muon._single_tensor_muon), names)
    return names["_single_tensor_muon"]


class ReferenceMuon(torch.optim.Optimizer):
    """Torch's Muon in float32 for the groups marked as hidden, torch's AdamW for the others."""

    def __init__(self, groups: Sequence[dict[str, Any]], options: ScheduleOptions) -> None:
        super().__init__(groups, {"lr": options.lr, "weight_decay": 0.0})
        self.options, self._muon = options, _function_in_float32()
        betas = (options.adam_beta1, options.adam_beta2)
        self._adamw = torch.optim.AdamW([g for g in groups if HIDDEN not in g], lr=options.lr, betas=betas, eps=options.adam_eps)
        self._adamw.state = self.state
        self.hidden = {p for group in groups if HIDDEN in group for p in group["params"]}
        assert all(p.ndim in (2, 3) for p in self.hidden)  # with 3 dimensions, a matrix for each expert

    def new_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Returns the state of a parameter before the first step."""
        if tensor in self.hidden:
            return {"momentum": torch.zeros_like(tensor)}
        return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes one step."""
        self._adamw.param_groups = [group for group in self.param_groups if HIDDEN not in group]
        self._adamw.step()
        options = self.options
        assert (options.muon_scale_mode, options.muon_extra_scale_factor) == ("spectral", 0.2), "match_rms_adamw of torch"
        for group in self.param_groups:
            if HIDDEN not in group:
                continue
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(self.new_state(parameter))
                of_each = [[t] if t.ndim == 2 else list(t) for t in (parameter.detach(), parameter.grad, state["momentum"])]
                self._muon(
                    *of_each, lr=group["lr"], weight_decay=group["weight_decay"],
                    momentum=options.muon_momentum, nesterov=options.muon_nesterov, ns_coefficients=(3.4445, -4.7750, 2.0315),
                    ns_steps=options.muon_num_ns_steps, eps=1e-7, adjust_lr_fn="match_rms_adamw", has_complex=False,
                )  # fmt: skip


def start_with_reference(argv: list[str]) -> int:
    """Runs the program with `--optimizer muon` as torch's function; on one rank and under ZeRO 0 only, where weights are whole."""
    from megatron_patch.optimizers.registry import OPTIMIZERS, OptimizerType
    from megatron_patch.training.pretrain import main

    assert "--zero-stage" in argv and argv[argv.index("--zero-stage") + 1] == "0"
    made: list[ReferenceMuon] = []

    def make(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> ReferenceMuon:
        made.append(ReferenceMuon(groups, options))
        return made[-1]

    OPTIMIZERS["muon"] = OptimizerType(make, full_matrices=True, hidden_states=1)
    code = main(argv)
    if code == 0:
        (optimizer,) = made
        assert optimizer.hidden and all(math.isfinite(float(optimizer.state[p]["momentum"].sum())) for p in optimizer.hidden)
    return code
