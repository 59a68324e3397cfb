"""Runs a pretraining job from the command line to the last checkpoint; the loop itself is `Trainer.train`.

In: flags. Out: checkpoints, metrics, and an exit code (`ExitCode`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_patch.config.resolve import RunConfig, load_config
from megatron_patch.data.missing_dataset import check_datasets
from megatron_patch.engine.deepspeed_config import EngineConfig, resolve_engine_config
from megatron_patch.engine.environment import ranks_from_environment, use_expandable_segments
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.requirements import explained_imports, require
from megatron_patch.training.dry_run import print_plan
from megatron_patch.training.faults.exit_protocol import print_advice, report_error
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.training.stream import open_stream_if_present
from megatron_patch.utils.console import flush_output, labeled, make_console
from megatron_patch.utils.files import deny_writing_by_everybody
from megatron_patch.utils.spelling import accept_all_text

if TYPE_CHECKING:
    from megatron_patch.training.callbacks.base import CallbackFactory


def pretrain(run: RunConfig, callbacks: Sequence[CallbackFactory] = ()) -> ExitCode:
    """Trains a run, or prints its plan with --dry-run.

    Args:
        run: the resolved run.
        callbacks: factories of further callbacks, called on every rank once the model is built.

    Returns:
        `ExitCode.DONE`, or `ExitCode.PREEMPTED` if the run was asked to stop.

    Raises:
        MegatronPatchError: the run cannot start or continue; the message says what to change.
    """
    engine_config = make_engine_config(run)
    if run.options.logging.dry_run:
        if ranks_from_environment()[0] != 0:
            return ExitCode.DONE
        console = make_console()
        stream, notes = open_stream_if_present(run)
        print_plan(run, engine_config, console, stream=stream)
        for note in notes:
            console.print(labeled("Note", note, "yellow"))
        return ExitCode.DONE
    check_start(run)
    # Never closed: a signal that arrives while the process exits must not change the exit code.
    stops = StopRequests(run.options.safety)
    use_expandable_segments()
    return train(run, engine_config, stops, make_watchdog(run), callbacks)


def check_start(run: RunConfig) -> None:
    """Checks what a run needs on this machine, before torch is imported.

    Raises:
        ConfigError: DeepSpeed is not installed.
        DataError: a dataset does not exist.
    """
    require("deepspeed", "training")
    check_datasets(run.data_words)


def train(
    run: RunConfig, engine_config: EngineConfig, stops: StopRequests, watchdog: Watchdog, callbacks: Sequence[CallbackFactory]
) -> ExitCode:
    """Joins the job, trains and leaves the job; every rank must call it.

    Args:
        run: the resolved run.
        engine_config: what `make_engine_config` returned for it.
        stops: requests to stop.
        watchdog: this rank's watchdog, which is closed at the end.
        callbacks: factories of further callbacks.

    Returns:
        `ExitCode.DONE`, or `ExitCode.PREEMPTED` if the run was asked to stop.

    Raises:
        MegatronPatchError: the run cannot start or continue. The process groups remain, because a peer may be inside of a collective.
    """
    # Torch and DeepSpeed take seconds to import, for which wrong flags and dry runs should not wait.
    from megatron_patch.engine.distributed import barrier, destroy_distributed, init_distributed
    from megatron_patch.engine.swapping import require_async_io
    from megatron_patch.training.checkpointer import StoppedBeforeTraining
    from megatron_patch.training.trainer import Trainer

    with watchdog:
        watchdog.heartbeat("the ranks join the job at MASTER_ADDR")
        device = init_distributed(run.options.engine.distributed_timeout_minutes)
        watchdog.follow_peers()
        if engine_config.precision == "fp16" and device.type == "cpu":
            raise ConfigError("--fp16 is given, but the ranks run on CPUs", "--bf16 or float32 on CPUs", "use --bf16, or run on GPUs")
        if engine_config.offloads_to_nvme:
            require_async_io()
        code = ExitCode.PREEMPTED
        if stops.agreed_request(device) is None:
            # All ranks raise it at the same point, so that they can leave the job as after training.
            with contextlib.suppress(StoppedBeforeTraining), Trainer(run, engine_config, device, stops, watchdog, callbacks) as trainer:
                code = trainer.train()
        watchdog.heartbeat("the ranks leave the job")
        # All ranks exit at the same time, because launchers kill the remaining ranks soon after the first exit.
        barrier()
        # Only without an error: otherwise peers may be inside a collective, for which this call would wait.
        destroy_distributed()
    return code


def make_watchdog(run: RunConfig) -> Watchdog:
    """Returns this rank's watchdog; it is watching already."""
    return Watchdog(run.options.safety.hang_timeout, run.save_folder, ranks_from_environment()[0])


def make_engine_config(run: RunConfig) -> EngineConfig:
    """Returns the configuration of DeepSpeed for a run.

    Raises:
        ConfigError: options exclude each other.
    """
    engine_config = resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)
    if engine_config.precision == "bf16" and engine_config.zero_level == 0 and run.options.engine.recompute_granularity != "none":
        raise ConfigError(
            "--bf16 is combined with --zero-stage 0 and recomputation",
            "--zero-stage 1 to 3 with recomputation, or --recompute-granularity none",
            "use --zero-stage 1, which also needs less memory",
        )
    return engine_config


def main(argv: Sequence[str] | None = None, callbacks: Sequence[CallbackFactory] = ()) -> int:
    """Runs the command line, prints an error in its three parts, and returns the exit code.

    A user's own script registers extensions and calls this function.

    Args:
        argv: the flags; None: those of this process.
        callbacks: factories of further callbacks (`Callable[[CallbackContext], Callback]`), called on every rank once the model is built.
            A dry run does not call them.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank, local_rank, save = 0, 0, None
    deny_writing_by_everybody()
    accept_all_text()
    try:
        rank, ranks, local_rank = ranks_from_environment()
        with explained_imports():
            run = load_config(arguments, ranks)
            save = None if run.options.logging.dry_run else run.save_folder
            code = pretrain(run, callbacks)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, rank, local_rank, save)
    else:
        if code != ExitCode.DONE and rank == 0:
            print_advice(code)
    flush_output()
    return int(code)
