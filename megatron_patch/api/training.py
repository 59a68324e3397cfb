"""Trains a run in this process, any number of times. In: a run, and the user's callbacks, optimizer and model. Out: `RunResult`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_patch.api.configuration import Source, as_config
from megatron_patch.api.own_parts import MakeModel, MakeOptimizer, check_takes, with_model, with_optimizer
from megatron_patch.checkpoint.commit import list_checkpoints
from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.in_process import run_in_process
from megatron_patch.utils.units import plural

if TYPE_CHECKING:
    from megatron_patch.training.callbacks.base import Callback, CallbackContext, CallbackFactory, StepRecord
    from megatron_patch.training.callbacks.recorder import Recorder


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        stop_reason: "done", "exit interval", or the request to stop: "SIGINT" (an interrupted notebook), "--exit-duration" and others.
        exit_code: the exit code of the command line for this end: `ExitCode.DONE`, or `ExitCode.PREEMPTED` if more steps are planned.
        step: optimizer steps taken since the start of the run.
        tokens: tokens read since the start of the run.
        seconds: duration of this call's training.
        training_loss: loss of the last step, in nats per label at the patch size of its stage; None without a step.
        token_loss: last held-out loss at K = 1, in nats per token; None without an evaluation.
        patch_loss: last held-out loss at the patch size of its stage, in nats per label; None without an evaluation.
        save: the run's folder, or None.
        checkpoint: the newest checkpoint, or None.
    """

    stop_reason: str
    exit_code: ExitCode
    step: int
    tokens: int
    seconds: float
    training_loss: float | None
    token_loss: float | None
    patch_loss: float | None
    save: Path | None
    checkpoint: Path | None
    _records: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def finished(self) -> bool:
        """Whether all planned steps were taken."""
        return self.stop_reason == "done"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of the run: dictionaries with a "type" (start, step, evaluation, switch, save, end) and the fields of that record.

        With a folder they are read from its metrics.jsonl, which has also those of earlier starts of the same run.
        """
        return list(_metrics(self.save)) if self.save is not None else [dict(record) for record in self._records]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Returns the records of one type, such as "step" or "evaluation"."""
        return [record for record in self.metrics if record.get("type") == kind]


def _metrics(save: Path) -> Iterator[dict[str, Any]]:
    from megatron_patch.training.callbacks.metrics import read_metrics

    path = save / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else iter(())


def each_step(function: Callable[[StepRecord], object]) -> Callback:
    """Returns a callback that calls a function with the record of each step: its loss, learning rate, gradient norm, speed and more.

    Raises:
        ConfigError: it cannot be called with a record.
    """
    if not callable(function):
        raise ConfigError(
            f"each_step({function!r})", "a function of a StepRecord", "give a function, such as lambda step: print(step.loss)"
        )
    check_takes(function, f"each_step({getattr(function, '__name__', function)})", "record")
    from megatron_patch.training.callbacks.base import Callback

    class EachStep(Callback):
        def on_step(self, record: StepRecord) -> None:
            function(record)

    return EachStep()


def pretrain(
    config: RunConfig | Source,
    *,
    callbacks: Sequence[Callback | CallbackFactory] = (),
    optimizer: MakeOptimizer | None = None,
    model: MakeModel | None = None,
) -> RunResult:
    """Trains a run, or resumes it if its folder (`save`) has a checkpoint.

    Needs no launcher for one device. With several, start the script with torchrun, deepspeed or srun; every rank must make the same calls.
    In the main thread, the first interrupt (Ctrl-C, or a notebook's stop button) saves a checkpoint and returns; a second one raises
    `KeyboardInterrupt`. Other threads receive no signals. Afterwards process groups, signal handlers, environment variables and the
    settings of torch are as they were, also after an error.

    Args:
        config: the run, or a YAML file or mapping for `load_config`.
        callbacks: callbacks, or factories of callbacks: functions or classes that take a `CallbackContext`. `each_step` makes one of a
            function. An exception in a callback ends the run and is raised here.
        optimizer: a function of parameter groups that makes a torch optimizer, in place of `--optimizer`. Its state must start from zeros
            (docs/extending.md); under ZeRO and tensor parallelism it must work element by element.
        model: a function of (shape, parallel) that makes a module with the parameters of
            `megatron_patch.model.parameters.parameters_of_layers(shape)` and the forward pass of `megatron_patch.model.gpt.GPTModel`.

    Returns:
        How the run ended: losses, steps, folders and metrics.

    Raises:
        ConfigError: the run cannot start as it is configured, or DeepSpeed is not installed.
        DataError: the data is missing, damaged or too small.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another run.
        SickTrainingError: too many steps were rejected.
        CorruptionError: ranks that must agree do not.
        KeyboardInterrupt: the run was interrupted twice.
    """
    if not isinstance(callbacks, Iterable):
        raise ConfigError(f"callbacks={callbacks!r} is not a list", "a list of callbacks", "write callbacks=[…]; leave it out for none")
    factories = [_factory(callback) for callback in callbacks]
    run = with_model(as_config(config), model)
    ranks = ranks_from_environment()[1]
    if run.options.logging.dry_run:
        raise ConfigError("pretrain with dry_run", "a run without dry_run", "show the plan of a run with plan(config)")
    if run.ranks != ranks:
        raise ConfigError(
            f"the configuration is for {plural(run.ranks, 'rank')}, but this job has {plural(ranks, 'rank')}",
            "the number of ranks that the launcher starts; 1 without a launcher",
            "leave world_size out, or start the script with torchrun, deepspeed or srun",
        )
    with with_optimizer(run, optimizer) as run:
        recorder = run_in_process(run, factories)
    return _result(run, recorder)


_MAKES_ONE = "a Callback, or a class or function of a CallbackContext that makes one"
_EACH_STEP = "give each_step(function) for a function that is called with each step's record"


def _factory(callback: Callback | CallbackFactory) -> CallbackFactory:
    from megatron_patch.training.callbacks.base import Callback

    if isinstance(callback, Callback):

        def same(_: CallbackContext) -> Callback:
            assert isinstance(callback, Callback)
            return callback

        return same

    name = getattr(callback, "__name__", callback)

    def made(context: CallbackContext) -> Callback:
        try:
            result = callback(context)
        except AttributeError as error:
            if error.obj is not context:
                raise
            raise ConfigError(
                f"the callback {name} uses {error.name}, which a CallbackContext does not have", _MAKES_ONE, _EACH_STEP
            ) from error
        if not isinstance(result, Callback):
            raise ConfigError(f"the callback {name} makes {type(result).__name__}", _MAKES_ONE, _EACH_STEP)
        return result

    if not callable(callback):
        raise ConfigError(f"the callback {callback!r} cannot be called", "a Callback, or what makes one", "derive its class from Callback")
    do = f"give an object of the class: {name}(…)" if isinstance(callback, type) and issubclass(callback, Callback) else _EACH_STEP
    check_takes(callback, f"the callback {name}", "context", do=do)
    return made


def _result(run: RunConfig, recorder: Recorder) -> RunResult:
    save, end = run.save_folder, recorder.end
    # Without a step in this call, as when there is nothing left to do, the file has the last ones.
    last = {record["type"]: record for record in _metrics(save)} if save is not None and recorder.last_step is None else {}
    step = recorder.last_step.loss if recorder.last_step is not None else last.get("step", {}).get("loss")
    evaluation = recorder.last_evaluation
    token, patch = (
        (evaluation.token_loss, evaluation.patch_loss)
        if evaluation is not None
        else (last.get("evaluation", {}).get("token_loss"), last.get("evaluation", {}).get("patch_loss"))
    )
    checkpoints = list_checkpoints(save) if save is not None else []
    return RunResult(
        stop_reason=end.reason if end is not None else "stopped before its first step",
        exit_code=ExitCode(end.code) if end is not None else ExitCode.PREEMPTED,
        step=end.step if end is not None else 0,
        tokens=end.tokens if end is not None else 0,
        seconds=end.seconds if end is not None else 0.0,
        training_loss=step,
        token_loss=token,
        patch_loss=patch,
        save=save,
        checkpoint=checkpoints[0] if checkpoints else None,
        _records=tuple(recorder.records),
    )
