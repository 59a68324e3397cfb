"""The loop: next batch, train step, account, evaluate if due, save if due, switch if due.

In: a resolved run that has joined its job. Out: a trained model in checkpoints. Nothing here knows how a stage differs from another
beyond its numbers; the switch is `Trainer._switch`, the only place where one stage becomes the next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_patch.checkpoint.lock import SaveLock
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig
from megatron_patch.engine.distributed import barrier
from megatron_patch.engine.interface import StepResult
from megatron_patch.errors import SickTrainingError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.groups import make_groups
from megatron_patch.planning.cost import Cost
from megatron_patch.stages import Progress, Stage, StagePlan
from megatron_patch.training.build_engine import build_engine
from megatron_patch.training.callbacks import make_callbacks
from megatron_patch.training.callbacks.base import (
    CallbackContext,
    CallbackFactory,
    EvaluationRecord,
    Event,
    RunEnd,
    RunStart,
    SaveRecord,
    StepRecord,
    SwitchRecord,
)
from megatron_patch.training.checkpointer import Checkpointer, make_retention, on_first_rank
from megatron_patch.training.data import open_data, sample_tokenizer
from megatron_patch.training.dry_run import print_plan
from megatron_patch.training.evaluate import EvaluationStopped, held_out_losses
from megatron_patch.training.faults.consistency import check_batches, check_programs, check_weights, replay
from megatron_patch.training.faults.step_guard import StepGuard
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.stragglers import StragglerDetector
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.training.lr_schedule import build_lr_schedule
from megatron_patch.training.resume import check_data, check_model, find_start_point, newest_valid, plan_to_resume, start_notes
from megatron_patch.training.throughput import DataWaitMonitor, Throughput, device_name, memory_gib
from megatron_patch.utils.console import make_console


class Trainer:
    """A run on this rank.

    Args:
        run: what to do.
        settings: DeepSpeed's part of it.
        device: this rank's device.
        stops: who may ask for a stop.
        watchdog: who is told what is begun.
        callbacks: factories of further callbacks.
    """

    def __init__(
        self,
        run: RunConfig,
        settings: EngineConfig,
        device: torch.device,
        stops: StopRequests,
        watchdog: Watchdog,
        callbacks: Sequence[CallbackFactory] = (),
    ) -> None:
        self.run, self.device, self.stops, self.watchdog = run, device, stops, watchdog
        world = torch.distributed.get_world_size()
        engine_options = run.options.engine
        self.grid = Grid(
            torch.distributed.get_rank(), world, engine_options.tensor_model_parallel_size, engine_options.pipeline_model_parallel_size
        )
        check_programs(run)
        ranks = make_groups(self.grid)
        self.save_folder = Path(run.options.checkpoint.save) if run.options.checkpoint.save else None
        self.checkpointer: Checkpointer | None = None
        lock = self._lock()
        tokenizer = sample_tokenizer(run)
        watchdog.heartbeat("checkpoints are verified")
        self.start = find_start_point(run.options.checkpoint, self.grid)
        found, resuming = self.start.found, self.start.resuming
        watchdog.heartbeat("the run starts")
        if found is not None:
            check_model(found.state, run, weights_only=not resuming)
        self.plan: StagePlan = plan_to_resume(found.state, run) if found is not None and resuming else run.plan
        self.progress = Progress(found.state.stage_index, found.state.stage_step) if found is not None and resuming else Progress(0, 0)
        self.cost = Cost(run.shape, self.plan, run.options.stages.seq_length)
        self.schedule = build_lr_schedule(self.plan)
        self.data = open_data(run, self.plan, self.grid, pin_memory=device.type == "cuda")
        self.fingerprint = self.data.stream.fingerprint()
        if found is not None and resuming:
            check_data(found.state, self.fingerprint)
        self.engine = build_engine(run, settings, self.stage, ranks, device, loading=found is not None, stopping=lambda: stops.signalled)
        if found is not None:
            self.engine.load(found.folder, found.state.engine if resuming else None)
        safety = run.options.safety
        self.guard = StepGuard(safety)
        if found is not None and resuming:
            self.guard.load_state(found.state.guard or {})
        self.stragglers = StragglerDetector(safety.straggler_interval, self.grid)
        if self.save_folder is not None:
            self.checkpointer = Checkpointer(
                self.save_folder, lock, self.grid.rank, world, device, make_retention(run, self.plan), run.options.checkpoint.async_save
            )
        self.throughput = Throughput(world, device_name(device), run.options.logging.peak_tflops)
        context = CallbackContext(run, self.save_folder, self.grid, self.engine.logits, tokenizer, device)
        self.callbacks = make_callbacks(context, callbacks)
        if self.grid.rank == 0:
            shown = dataclasses.replace(run, plan=self.plan)
            print_plan(shown, settings, make_console(), origins=False, stream=self.data.stream)
            if lock is not None and lock.took_over:
                self._tell(f"took the lock of {self.save_folder} over from {lock.took_over}, which has died")
            for note in start_notes(self.start, self.save_folder, self.plan, self.progress) + self.data.notes():
                self._tell(note)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.watchdog.heartbeat("the run ends")
        if self.checkpointer is not None:
            self.checkpointer.close()
        for callback in self.callbacks:
            callback.close()

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.plan.stages[self.progress.stage_index]

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.plan.step(self.progress)

    def train(self) -> ExitCode:
        """Trains from where the run stands to its end, or to where somebody asks it to stop."""
        started = time.monotonic()
        self._announce_start()
        while (reason := self._train_stage()) is None:
            if self.progress.stage_index + 1 == len(self.plan.stages):
                reason = "done"
                break
            self._switch()
        self.watchdog.heartbeat("the last checkpoint is written")
        if self.checkpointer is not None:
            self._tell_saved(self.checkpointer.wait())
        code = ExitCode.DONE if reason in ("done", "exit interval") else ExitCode.PREEMPTED
        for callback in self.callbacks:
            callback.on_end(RunEnd(reason, self.step, self.plan.consumed_tokens(self.progress), time.monotonic() - started, code))
        barrier()
        self.watchdog.stop_listening()
        return code

    def _train_stage(self) -> str | None:
        """Trains to the end of the stage, evaluates and saves there; or the reason to stop before."""
        stage = self.stage
        if self.progress.stage_step == stage.steps:
            return None
        asked = self.stops.agreed(self.device)
        if asked is not None:
            return asked
        self.watchdog.heartbeat("the first data of the stage are read")
        loader = self.data.loader(self.progress.stage_index, self.progress.stage_step)
        wait = DataWaitMonitor(loader.times)
        try:
            while self.progress.stage_step < stage.steps:
                began = time.perf_counter()
                self.watchdog.heartbeat(f"step {self.step + 1:,} waits for data")
                micro_batches = loader.next_step()
                data_seconds = time.perf_counter() - began
                self.watchdog.heartbeat(f"step {self.step + 1:,} is computed")
                self._check_consistency(micro_batches)
                weights = stage.weights_at(self.progress.stage_step)
                after = Progress(self.progress.stage_index, self.progress.stage_step + 1)
                lr = self.schedule.at(self.plan.consumed_tokens(after))
                result = self.engine.train_step(micro_batches, weights, lr, self.guard)
                for callback in self.callbacks:
                    callback.on_batches(self.step + 1, stage, micro_batches)
                self.progress = after
                step_seconds = time.perf_counter() - began
                self._account(result, lr, step_seconds, data_seconds)
                if (note := wait.update(step_seconds, data_seconds)) is not None:
                    self._tell(note)
                self._treat(result)
                if self.checkpointer is not None:
                    self._tell_saved(self.checkpointer.poll())
                ended = self.progress.stage_step == stage.steps
                asked = self.stops.agreed(self.device)
                if ended or self._due(self.run.options.logging.eval_interval, self.run.options.logging.eval_interval_tokens):
                    asked = asked or self._evaluate()
                if asked is None and self.step < self.plan.steps and self._due(self.run.options.checkpoint.exit_interval, None):
                    asked = "exit interval"
                checkpoint = self.run.options.checkpoint
                if ended or asked or self._due(checkpoint.save_interval, checkpoint.save_interval_tokens):
                    self._save(stage_end=ended)
                if asked and self.step < self.plan.steps:
                    return asked
        finally:
            loader.close()
        return None

    def _check_consistency(self, micro_batches: Sequence[PatchBatch]) -> None:
        safety = self.run.options.safety
        if self._due(safety.check_replicas_interval, None):
            check_weights(self.engine)
            check_batches(self.grid, micro_batches)
        if self._due(safety.replay_interval, None):
            replay(self.engine, micro_batches[0])

    def _treat(self, result: StepResult) -> None:
        """Remembers a step that was taken; of one that was not, says which data it had and does what was asked for."""
        for text in self.stragglers.add(result.forward_seconds):
            self._report("straggler", f"slow: {text}", {})
        if result.rejection is None:
            if not result.skipped:
                self.guard.record_taken(result.loss, result.grad_norm)
            return
        spans = self.data.stream.spans_of_step(self.progress.stage_index, self.progress.stage_step - 1)
        details = {"reason": result.rejection, "stage": self.stage.name, "spans": spans}
        self._report("skip", f"step {self.step:,} is not taken: {result.rejection}", details)
        try:
            self.guard.record_rejected(result.rejection)
        except SickTrainingError:
            # All ranks are here, so that a checkpoint under way need not be given up.
            if self.checkpointer is not None:
                self._tell_saved(self.checkpointer.wait())
            raise
        if self.run.options.safety.on_spike == "rewind":
            self._rewind()

    def _rewind(self) -> None:
        """Back to the weights and the optimizer of the newest checkpoint; its data and what came since are not read again."""
        if self.checkpointer is not None:
            self._tell_saved(self.checkpointer.wait())
        here = self.step
        # What lies behind this step is of a life that --load went back from.
        found = newest_valid(self.save_folder, self.grid, lambda state: state.step <= here) if self.save_folder is not None else None
        if found is None:
            self._report("rewind", "no checkpoint to go back to; the step's update alone is left out", {})
            return
        self.engine.load(found.folder, found.state.engine)
        if found.state.stage_index < self.progress.stage_index:
            # It is from before the switch, whose treatment of the optimizer it lacks.
            self.engine.switch_stage(self.stage)
        left_out = self.step - found.state.step
        message = f"back to the weights of step {found.state.step:,}; {left_out:,} steps of data are left out"
        self._report("rewind", message, {"to_step": found.state.step, "left_out": left_out})
        self._save(stage_end=False)

    def _report(self, kind: str, message: str, details: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_event(Event(kind, self.step, message, details))

    def _switch(self) -> None:
        """The switch: the next stage's batch, shapes, labels, optimizer policy and data; the schedule moves on by itself."""
        before = self.stage
        self.progress = Progress(self.progress.stage_index + 1, 0)
        self.engine.switch_stage(self.stage)
        self.guard.begin_stage()
        self.throughput.reset()
        record = SwitchRecord(
            step=self.step,
            tokens=self.plan.consumed_tokens(self.progress),
            from_stage=before.name,
            to_stage=self.stage.name,
            from_patch_size=before.patch_size,
            to_patch_size=self.stage.patch_size,
        )
        for callback in self.callbacks:
            callback.on_switch(record)

    def _due(self, steps: int | None, tokens: int | None) -> bool:
        """Whether an interval, in steps or tokens, ended with the last step."""
        if steps is not None:
            return self.step % steps == 0
        if tokens is None:
            return False
        now = self.plan.consumed_tokens(self.progress)
        return now // tokens > (now - self.stage.tokens_per_step) // tokens

    def _account(self, result: StepResult, lr: float, seconds: float, data_seconds: float) -> None:
        stage = self.stage
        rates = self.throughput.update(seconds, data_seconds, stage.tokens_per_step, stage.positions_per_step, self.cost.step_flops(stage))
        record = StepRecord(
            step=self.step,
            stage=stage.name,
            stage_index=self.progress.stage_index,
            patch_size=stage.patch_size,
            tokens=self.plan.consumed_tokens(self.progress),
            cost_tokens=self.cost.cost_tokens(self.progress),
            cost=self.cost.share(self.progress),
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rates.tokens_per_second,
            positions_per_second=rates.positions_per_second,
            tflops=rates.tflops,
            mfu=rates.mfu,
            memory_gib=memory_gib(self.device),
            data_seconds=data_seconds,
            step_seconds=seconds,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
        )
        for callback in self.callbacks:
            callback.on_step(record)

    def _evaluate(self) -> str | None:
        """Held-out losses; or who asked to stop meanwhile: the evaluation is then left out."""
        if not self.data.held_out:
            return None
        began, stage, options = time.perf_counter(), self.stage, self.run.options
        try:
            token_level, patch_level = held_out_losses(
                self.engine, self.data, stage, options.stages.seq_length, options.logging.eval_tokens, self._stop_of_evaluation
            )
        except EvaluationStopped as asked:
            return str(asked)
        record = EvaluationRecord(
            step=self.step,
            stage=stage.name,
            stage_index=self.progress.stage_index,
            patch_size=stage.patch_size,
            tokens=self.plan.consumed_tokens(self.progress),
            cost_tokens=self.cost.cost_tokens(self.progress),
            split="valid",
            token_loss=token_level.loss,
            patch_loss=patch_level.loss,
            eval_tokens=token_level.labels,
            seconds=time.perf_counter() - began,
        )
        self.throughput.reset()
        for callback in self.callbacks:
            callback.on_evaluation(record)
        return None

    def _stop_of_evaluation(self) -> str | None:
        self.watchdog.heartbeat(f"step {self.step:,} is evaluated")
        return self.stops.agreed(self.device)

    def _save(self, stage_end: bool) -> None:
        """Commits a checkpoint, or with --async-save begins to: every rank writes its part, then one manifest makes it visible."""
        if self.checkpointer is None:
            return
        self.watchdog.heartbeat(f"step {self.step:,} is saved")
        if self.run.options.safety.check_replicas_interval is not None:
            # Corruption must not become what the run goes on from.
            check_weights(self.engine)
        state = functools.partial(
            TrainerState,
            step=self.step,
            stage_index=self.progress.stage_index,
            stage_step=self.progress.stage_step,
            stage_name=self.stage.name,
            consumed_tokens=self.plan.consumed_tokens(self.progress),
            consumed_samples=self.progress.stage_step * self.stage.global_batch_size,
            plan=self.plan.to_json(),
            config=self.run.to_json(),
            data_fingerprint=self.fingerprint,
            model=dataclasses.asdict(self.run.shape),
            stage_end=stage_end,
            guard=self.guard.state(),
            begun_from=self.start.begun_from,
            data_metadata=dataclasses.asdict(self.run.data_metadata) if self.run.data_metadata else None,
        )
        records = self.checkpointer.save(self.step, self.engine, lambda engine: state(engine=dict(engine)))
        self.throughput.reset()
        self._tell_saved(records)

    def _tell_saved(self, records: list[SaveRecord]) -> None:
        for record in records:
            for callback in self.callbacks:
                callback.on_save(record)

    def _lock(self) -> SaveLock | None:
        """Rank 0's right to write the run's folder, before anything in it is looked at."""
        locks: list[SaveLock] = []
        if (save := self.save_folder) is not None:
            on_first_rank(self.grid.rank, save, lambda: locks.append(SaveLock(save)))
        return locks[0] if locks else None

    def _announce_start(self) -> None:
        plan = self.plan
        record = RunStart(
            step=self.step,
            total_steps=plan.steps,
            total_tokens=plan.tokens,
            switches=tuple((plan.first_token(index), plan.stages[index].name) for index in range(1, len(plan.stages))),
            tokens=plan.consumed_tokens(self.progress),
            device=device_name(self.device),
            ranks=self.grid.world_size,
            save=str(self.save_folder) if self.save_folder else None,
            token_flops=self.cost.token_flops,
            whole_cost=self.cost.whole,
        )
        for callback in self.callbacks:
            callback.on_start(record)

    def _tell(self, text: str) -> None:
        for callback in self.callbacks:
            callback.on_message(text)
