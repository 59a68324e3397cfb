"""The training loop: next batch, train step, account, evaluate if due, save if due, switch if due.

In: a resolved run on a rank that has joined its job. Out: a trained model in checkpoints. For the loop, stages differ only in their
numbers; `Trainer._switch` is the only place where one stage becomes the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from megatron_patch.config.resolve import RunConfig, with_plan
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.deepspeed_config import EngineConfig
from megatron_patch.engine.distributed import barrier
from megatron_patch.engine.interface import StepResult
from megatron_patch.engine.ranges import named_range
from megatron_patch.errors import SickTrainingError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.groups import make_groups
from megatron_patch.planning.cost import Cost
from megatron_patch.stages import Progress, Stage
from megatron_patch.training.accounting import Accounting
from megatron_patch.training.build_engine import build_engine
from megatron_patch.training.callbacks import make_callbacks
from megatron_patch.training.callbacks.base import CallbackContext, CallbackFactory, Event, RunEnd, SaveRecord
from megatron_patch.training.checkpointer import lock_folder, make_checkpointer, on_first_rank
from megatron_patch.training.data import open_data, sample_tokenizer
from megatron_patch.training.dry_run import print_plan
from megatron_patch.training.evaluate import EvaluationStopped, held_out_losses
from megatron_patch.training.expert_load import ExpertLoadMonitor
from megatron_patch.training.faults.consistency import check_batches, check_programs, check_weights, replay
from megatron_patch.training.faults.step_guard import StepGuard
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.stragglers import StragglerDetector
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.training.lr_schedule import build_lr_schedule
from megatron_patch.training.resume import find_newest_valid_together, find_start_point, held_out_names, make_trainer_state, start_notes
from megatron_patch.training.resume_checks import check_data
from megatron_patch.training.rollback import roll_back
from megatron_patch.training.throughput import DataWaitMonitor
from megatron_patch.utils.console import make_console
from megatron_patch.utils.units import plural


class Trainer:
    """One rank of a run, from its start to its end.

    Args:
        run: the resolved run.
        engine_config: DeepSpeed's part of it.
        device: the device of this rank.
        stops: requests to stop.
        watchdog: receives a heartbeat for each activity that begins.
        callbacks: factories of further callbacks.

    Raises:
        MegatronPatchError: the run cannot start; the message says what to change.
        StoppedBeforeTraining: the run was asked to stop while it waited for the lock of its folder.
    """

    def __init__(
        self,
        run: RunConfig,
        engine_config: EngineConfig,
        device: torch.device,
        stops: StopRequests,
        watchdog: Watchdog,
        callbacks: Sequence[CallbackFactory] = (),
    ) -> None:
        self.device, self.stops, self.watchdog = device, stops, watchdog
        with contextlib.ExitStack() as opened:
            self._open(run, engine_config, callbacks, opened)
            self._opened = opened.pop_all()

    def _open(
        self, run: RunConfig, engine_config: EngineConfig, callbacks: Sequence[CallbackFactory], opened: contextlib.ExitStack
    ) -> None:
        """Opens everything that a run needs; what must be closed after it, also if this method fails, is pushed onto `opened`."""
        device, stops, watchdog = self.device, self.stops, self.watchdog
        self.grid = _make_grid(run)
        self.save_folder = run.save_folder
        check_programs(run)
        expert_size = run.options.engine.expert_model_parallel_size
        sizes = {stage.context_parallel_size for stage in run.plan.stages}
        groups = make_groups(self.grid, sizes, run.gathering_sizes, expert_size)
        lock = lock_folder(self.save_folder, self.grid.rank, device, stops, watchdog)
        if lock is not None:
            opened.callback(lock.release)
        tokenizer = sample_tokenizer(run)

        watchdog.heartbeat("checkpoints are being verified")
        self.start = find_start_point(run, self.grid)
        watchdog.heartbeat("the run starts")
        self.plan, self.progress = self.start.plan, self.start.progress
        self.run = run = with_plan(run, self.plan) if self.start.resuming else run
        self.schedule = build_lr_schedule(self.plan)

        used = held_out_names(self.start.resumed)
        self.data = open_data(run, self.plan, self.grid, pin_memory=device.type == "cuda", used=used)
        self.fingerprint = self.data.stream.fingerprint()
        if self.start.resumed is not None:
            check_data(self.start.resumed, self.fingerprint)

        self.engine = build_engine(run, engine_config, self.start, groups, device, lambda: stops.signalled)
        opened.push(self._close_engine)
        self.guard = StepGuard(run.options.safety)
        if self.start.resumed is not None:
            self.guard.load_state(self.start.resumed.guard or {})
        self.stragglers = StragglerDetector(run.options.safety.straggler_interval, self.grid)
        self.checkpointer = make_checkpointer(run, self.plan, self.grid, device, lock)
        if self.checkpointer is not None:
            opened.callback(self.checkpointer.close)

        self.cost = Cost(run.shape, self.plan, run.options.stages.seq_length)
        self.expert_load = ExpertLoadMonitor(run.shape.experts, self.plan.stages)
        self.accounting = Accounting(self.plan, self.cost, device, self.grid.world_size, run.options.logging.peak_tflops)
        context = CallbackContext(run, self.save_folder, self.grid, self.engine.logits, tokenizer, device)
        self.callbacks = make_callbacks(context, callbacks)
        for callback in reversed(self.callbacks):
            opened.callback(callback.close)
        self._evaluated_at: int | None = None
        self._noted: set[str] = set()
        if self.grid.rank == 0:
            self._print_start(engine_config, lock.replaced_owner if lock is not None else None)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.watchdog.heartbeat("the run ends")
        self._opened.__exit__(kind, error, traceback)

    def _close_engine(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Closes the engine, unless this rank's GPU may be inside of a collective with a peer, for which closing would wait."""
        if error is None:
            self.engine.close()
        elif self.grid.world_size == 1 or self.device.type == "cpu":
            with contextlib.suppress(Exception):  # the first error explains more
                self.engine.close()

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.plan.stages[self.progress.stage_index]

    @property
    def step(self) -> int:
        """Optimizer steps taken since the start of the run."""
        return self.plan.step(self.progress)

    @property
    def _evaluation_is_missing(self) -> bool:
        """Whether there is held-out data on which the present weights were not evaluated."""
        return bool(self.data.held_out) and self._evaluated_at != self.step

    def train(self) -> ExitCode:
        """Trains until the plan is done or the run is asked to stop; returns the exit code."""
        started = time.monotonic()
        if (folder := self.save_folder) is not None:
            # All ranks wait for it, so that none appends to a file that is being replaced.
            at = on_first_rank(self.grid.rank, folder, lambda: roll_back(folder, self.step, self.progress))
            self._evaluated_at = at if isinstance(at, int) else None
        record = self.accounting.start(self.progress, self.save_folder)
        for callback in self.callbacks:
            callback.on_start(record)
        while (stop_reason := self._train_stage()) is None:
            if self.progress.stage_index + 1 == len(self.plan.stages):
                stop_reason = "done"
                break
            self._switch()
        return self._finish(stop_reason, started)

    def _train_stage(self) -> str | None:
        """Trains through the stage, saves and evaluates at its end, and returns None; or returns the reason to stop earlier."""
        stage, logging, checkpoint = self.stage, self.run.options.logging, self.run.options.checkpoint
        if self.progress.stage_step == stage.steps:
            # A request to stop in the last step, or in its evaluation, left the stage without an evaluation.
            return self._evaluate() if self._evaluation_is_missing else None
        if (stop_reason := self.stops.agreed_request(self.device)) is not None:
            return stop_reason
        self.watchdog.heartbeat("the first batch of the stage is being read")
        with contextlib.closing(self.data.loader(self.progress.stage_index, self.progress.stage_step)) as loader:
            data_wait = DataWaitMonitor(loader.times)
            while self.progress.stage_step < stage.steps:
                for callback in self.callbacks:
                    callback.on_step_begin(self.step + 1)
                began = time.perf_counter()
                self.watchdog.heartbeat(f"step {self.step + 1:,} waits for data")
                with named_range("data"):
                    micro_batches = loader.next_step()
                data_seconds = time.perf_counter() - began
                result, lr = self._train_step(micro_batches)
                seconds = time.perf_counter() - began

                self._account(result, lr, seconds, data_seconds)
                self._print(data_wait.update(seconds, data_seconds))
                self._handle_rejection(result)
                if self.checkpointer is not None:
                    self._report_saves(self.checkpointer.poll())

                stage_ends = self.progress.stage_step == stage.steps
                stop_reason = self.stops.agreed_request(self.device)
                if stop_reason is None and (stage_ends or self._is_due(logging.eval_interval, logging.eval_interval_tokens)):
                    stop_reason = self._evaluate()
                if stop_reason is None and self.step < self.plan.steps and self._is_due(checkpoint.exit_interval):
                    stop_reason = "exit interval"
                if stage_ends or stop_reason or self._is_due(checkpoint.save_interval, checkpoint.save_interval_tokens):
                    self._save(stage_ends)
                if stop_reason and (self.step < self.plan.steps or self._evaluation_is_missing):
                    return stop_reason
        return None

    def _train_step(self, micro_batches: Sequence[PatchBatch]) -> tuple[StepResult, float]:
        """Takes one optimizer step, unless the step guard rejects it, and advances the progress; returns result and learning rate."""
        self.watchdog.heartbeat(f"step {self.step + 1:,} is being computed")
        self._check_consistency(micro_batches)
        after = dataclasses.replace(self.progress, stage_step=self.progress.stage_step + 1)
        label_weights = self.stage.weights_at(self.progress.stage_step)
        lr = self.schedule.at(self.plan.consumed_tokens(after))
        with named_range("step"):
            result = self.engine.train_step(micro_batches, label_weights, lr, self.guard)
        for callback in self.callbacks:
            callback.on_batches(self.step + 1, self.stage, micro_batches)
        self.progress = after
        return result, lr

    def _check_consistency(self, micro_batches: Sequence[PatchBatch]) -> None:
        """Compares ranks and repeats a computation, where the intervals for it are given."""
        safety = self.run.options.safety
        if self._is_due(safety.check_replicas_interval):
            check_weights(self.engine)
            check_batches(self.grid, micro_batches, self.stage.context_parallel_size)
        if self._is_due(safety.replay_interval):
            replay(self.engine, micro_batches[0])

    def _account(self, result: StepResult, lr: float, seconds: float, data_seconds: float) -> None:
        """Reports the step to the callbacks."""
        record = self.accounting.step(self.progress, result, lr, seconds, data_seconds)
        for callback in self.callbacks:
            callback.on_step(record)
        for collapse in self.expert_load.add(record):
            self._report_event("collapse", collapse.message, **collapse.details)
        for slow_rank in self.stragglers.add(result.forward_seconds):
            self._report_event("straggler", slow_rank)

    def _handle_rejection(self, result: StepResult) -> None:
        """Counts the step for the step guard; after a rejected step, reports its data and does what --on-spike says.

        Raises:
            SickTrainingError: training must stop.
        """
        if result.rejection is None:
            if not result.skipped:
                self.guard.record_taken(result.loss, result.grad_norm)
            return
        spans = self.data.stream.spans_of_step(self.progress.stage_index, self.progress.stage_step - 1)
        details = {"reason": result.rejection, "stage": self.stage.name, "spans": spans}
        self._report_event("skip", f"step {self.step:,} is rejected: {result.rejection}", **details)
        try:
            self.guard.record_rejected(result.rejection)
        except SickTrainingError:
            # All ranks are here, so that a checkpoint in the background can still be committed.
            self._wait_for_save()
            raise
        if self.run.options.safety.on_spike == "rewind":
            self._rewind()

    def _rewind(self) -> None:
        """Loads weights and optimizer state from the newest checkpoint of this branch; the data read since then is not read again."""
        self._wait_for_save()
        here = self.step
        # Newer checkpoints belong to a branch that --load abandoned.
        found = None
        if self.save_folder is not None:
            found = find_newest_valid_together(self.save_folder, self.grid, lambda state: state.step <= here)
        if found is None:
            self._report_event("rewind", "there is no checkpoint to return to; only the update of this step is skipped")
            return
        self.engine.load(found.folder, found.state.engine)
        if found.state.stage_index < self.progress.stage_index:
            # The checkpoint is from before the switch, which may have reset the optimizer.
            self.engine.switch_stage(self.stage)
        to_step, left_out = found.state.step, self.step - found.state.step
        message = f"back to the weights and optimizer state of step {to_step:,}; the data of {plural(left_out, 'step')} is left out"
        self._report_event("rewind", message, to_step=to_step, left_out=left_out)
        self._save(stage_ends=False)

    def _switch(self) -> None:
        """Moves to the next stage: batch sizes, shapes and optimizer state. The next `_train_stage` opens its data."""
        self.progress = Progress(self.progress.stage_index + 1, 0)
        with named_range("switch"):
            self.engine.switch_stage(self.stage)
        self.guard.begin_stage()
        self.accounting.interrupt()
        record = self.accounting.switch(self.progress)
        for callback in self.callbacks:
            callback.on_switch(record)

    def _evaluate(self) -> str | None:
        """Computes and reports the held-out losses; returns the reason to stop if a request ends the evaluation early."""
        if not self.data.held_out:
            return None

        def stop_reason() -> str | None:
            self.watchdog.heartbeat(f"step {self.step:,} is being evaluated")
            return self.stops.agreed_request(self.device)

        began, options = time.perf_counter(), self.run.options
        try:
            with named_range("evaluation"):
                losses = held_out_losses(
                    self.engine, self.data, self.stage, options.stages.seq_length, options.logging.eval_tokens, stop_reason
                )
        except EvaluationStopped as stopped:
            return stopped.reason
        self._evaluated_at = self.step
        record = self.accounting.evaluation(self.progress, losses, time.perf_counter() - began)
        self.accounting.interrupt()
        for callback in self.callbacks:
            callback.on_evaluation(record)
        for note in losses.notes:
            if note not in self._noted:
                self._noted.add(note)
                self._print(note)
        return None

    def _save(self, stage_ends: bool) -> None:
        """Commits a checkpoint, or starts to with --async-save."""
        if self.checkpointer is None:
            return
        self.watchdog.heartbeat(f"step {self.step:,} is being saved")
        if self.run.options.safety.check_replicas_interval is not None:
            # A checkpoint must not keep corrupt weights.
            check_weights(self.engine)
        state = functools.partial(
            make_trainer_state,
            self.run,
            self.start,
            self.progress,
            self.fingerprint,
            self.guard.state(),
            stage_ends,
            held_out=self.data.held_out_names,
        )
        with named_range("save"):
            records = self.checkpointer.save(self.step, self.engine, state)
        self.accounting.interrupt()
        self._report_saves(records)

    def _finish(self, stop_reason: str, started: float) -> ExitCode:
        """Waits for the last checkpoint and for all ranks, reports the end, and returns the exit code."""
        self.watchdog.heartbeat("the last checkpoint is being written")
        self._wait_for_save()
        code = ExitCode.DONE if stop_reason in ("done", "exit interval") else ExitCode.PREEMPTED
        record = RunEnd(stop_reason, self.step, self.plan.consumed_tokens(self.progress), time.monotonic() - started, code)
        for callback in self.callbacks:
            callback.on_end(record)
        barrier()
        self.watchdog.stop_following()
        return code

    def _is_due(self, steps: int | None, tokens: int | None = None) -> bool:
        """Returns whether an interval, in steps or else in tokens, ended with the last step; without an interval never."""
        if steps is not None:
            return self.step % steps == 0
        if tokens is None:
            return False
        now = self.plan.consumed_tokens(self.progress)
        return now // tokens > (now - self.stage.tokens_per_step) // tokens

    def _wait_for_save(self) -> None:
        if self.checkpointer is not None:
            self._report_saves(self.checkpointer.wait())

    def _report_saves(self, records: Sequence[SaveRecord]) -> None:
        for record in records:
            for callback in self.callbacks:
                callback.on_save(record)

    def _report_event(self, kind: str, message: str, **details: Any) -> None:
        for callback in self.callbacks:
            callback.on_event(Event(kind, self.step, message, details))

    def _print_start(self, engine_config: EngineConfig, stale_owner: str | None) -> None:
        """Prints the plan that the run follows, where it starts, and what the user should know of it."""
        print_plan(self.run, engine_config, make_console(), origins=False, stream=self.data.stream)
        if stale_owner is not None:
            self._print(f"took over the lock of {self.save_folder}: its owner, {stale_owner}, no longer runs")
        for note in start_notes(self.start, self.save_folder) + self.data.notes():
            self._print(note)

    def _print(self, message: str | None) -> None:
        if message is not None:
            for callback in self.callbacks:
                callback.on_message(message)


def _make_grid(run: RunConfig) -> Grid:
    engine, distributed = run.options.engine, torch.distributed
    return Grid(
        distributed.get_rank(), distributed.get_world_size(), engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size
    )
