"""Turns what happens in a run into the records that callbacks receive.

In: the plan, the costs and the progress of a run, and what the engine measured. Out: `RunStart`, `StepRecord`, `EvaluationRecord` and
`SwitchRecord`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_patch.engine.interface import StepResult
from megatron_patch.planning.cost import Cost
from megatron_patch.stages import Progress, Stage, StagePlan
from megatron_patch.training.callbacks.base import EvaluationRecord, RunStart, StepRecord, SwitchRecord
from megatron_patch.training.evaluate import HeldOutLosses
from megatron_patch.training.throughput import Throughput, device_name, memory_gib


class Accounting:
    """Makes the records of one run; every rank has one.

    Args:
        plan: the plan that the run follows.
        cost: FLOPs of its steps.
        device: the device of this rank.
        ranks: number of ranks, one device each.
        peak_tflops: peak TFLOP/s of one device; None: from the table of known devices.
    """

    def __init__(self, plan: StagePlan, cost: Cost, device: torch.device, ranks: int, peak_tflops: float | None) -> None:
        self._plan, self._cost, self._device, self._ranks = plan, cost, device, ranks
        self._throughput = Throughput(ranks, device_name(device), peak_tflops)

    def interrupt(self) -> None:
        """Starts a new window of the throughput, because something other than a step took time (an evaluation, a save, a switch)."""
        self._throughput.reset()

    def start(self, progress: Progress, save: Path | None) -> RunStart:
        """Returns the record of a start.

        Args:
            progress: where the run starts.
            save: the run's folder (--save), or None.
        """
        plan = self._plan
        return RunStart(
            step=plan.step(progress),
            total_steps=plan.steps,
            total_tokens=plan.tokens,
            switches=tuple((plan.first_token(index), plan.stages[index].name) for index in range(1, len(plan.stages))),
            tokens=plan.consumed_tokens(progress),
            device=device_name(self._device),
            ranks=self._ranks,
            save=str(save) if save else None,
            token_flops=self._cost.token_flops,
            whole_cost=self._cost.total,
        )

    def step(self, progress: Progress, result: StepResult, lr: float, seconds: float, data_seconds: float) -> StepRecord:
        """Returns the record of a step and counts its time for the throughput.

        Args:
            progress: the progress after the step.
            result: what the engine returned.
            lr: learning rate of the step.
            seconds: duration of the step, including the wait for its data.
            data_seconds: the part of it spent waiting for data.
        """
        stage = self._stage(progress)
        flops = self._cost.step_flops(stage)
        rates = self._throughput.update(seconds, data_seconds, stage.tokens_per_step, stage.positions_per_step, flops)
        return StepRecord(
            step=self._plan.step(progress),
            stage=stage.name,
            stage_index=progress.stage_index,
            patch_size=stage.patch_size,
            tokens=self._plan.consumed_tokens(progress),
            cost_tokens=self._cost.cost_tokens(progress),
            cost=self._cost.share(progress),
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rates.tokens_per_second,
            positions_per_second=rates.positions_per_second,
            tflops=rates.tflops,
            mfu=rates.mfu,
            memory_gib=memory_gib(self._device),
            data_seconds=data_seconds,
            step_seconds=seconds,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            expert_blocks=tuple(load.block for load in result.experts),
            expert_load=tuple(load.largest for load in result.experts),
            dead_experts=tuple(load.dead for load in result.experts),
            router_entropy=tuple(load.entropy for load in result.experts),
        )

    def evaluation(self, progress: Progress, losses: HeldOutLosses, seconds: float) -> EvaluationRecord:
        """Returns the record of an evaluation.

        Args:
            progress: the progress at which the weights were evaluated.
            losses: the losses.
            seconds: duration of the evaluation.
        """
        stage = self._stage(progress)
        return EvaluationRecord(
            step=self._plan.step(progress),
            stage=stage.name,
            stage_index=progress.stage_index,
            patch_size=stage.patch_size,
            tokens=self._plan.consumed_tokens(progress),
            cost_tokens=self._cost.cost_tokens(progress),
            split="valid",
            token_loss=losses.token_loss,
            patch_loss=losses.patch_loss,
            eval_tokens=losses.labels,
            seconds=seconds,
            corpora=losses.corpora,
        )

    def switch(self, progress: Progress) -> SwitchRecord:
        """Returns the record of the switch into the stage that the progress is at the start of."""
        before, after = self._plan.stages[progress.stage_index - 1], self._stage(progress)
        return SwitchRecord(
            step=self._plan.step(progress),
            tokens=self._plan.consumed_tokens(progress),
            from_stage=before.name,
            to_stage=after.name,
            from_patch_size=before.patch_size,
            to_patch_size=after.patch_size,
        )

    def _stage(self, progress: Progress) -> Stage:
        return self._plan.stages[progress.stage_index]
