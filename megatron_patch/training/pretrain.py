"""Pretraining, from the command line to the last checkpoint; read `Trainer.train` from top to bottom.

In: flags. Out: checkpoints, metrics, and an exit code (`ExitCode`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_patch.config.resolve import RunConfig, load_config
from megatron_patch.engine.deepspeed_config import EngineConfig, engine_config
from megatron_patch.engine.environment import ranks_from_environment, use_expandable_segments
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.dry_run import print_plan
from megatron_patch.training.faults.exit_protocol import print_advice, report_error
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.training.stream import open_stream_if_present
from megatron_patch.utils.console import flush_output, make_console

if TYPE_CHECKING:
    from megatron_patch.training.callbacks.base import CallbackFactory


def pretrain(run: RunConfig, callbacks: Sequence[CallbackFactory] = ()) -> ExitCode:
    """Trains as a run says, or prints its plan in a dry run.

    Args:
        run: the resolved run.
        callbacks: factories of further callbacks, called on every rank once the model is built.

    Returns:
        Done, or stopped on request.

    Raises:
        MegatronPatchError: what the user has to change.
    """
    settings = engine_settings(run)
    if run.options.logging.dry_run:
        console = make_console()
        stream, notes = open_stream_if_present(run)
        print_plan(run, settings, console, stream=stream)
        for note in notes:
            console.print(f"[yellow]Note[/yellow] {note}", highlight=False)
        return ExitCode.DONE
    # Never given back: a signal that comes while the process leaves is no reason for another exit code.
    stops = StopRequests(run.options.safety)
    use_expandable_segments()
    # Torch and DeepSpeed take seconds to import, which wrong flags and dry runs need not wait for.
    from megatron_patch.engine.distributed import barrier, destroy_distributed, init_distributed
    from megatron_patch.engine.swapping import require_async_io
    from megatron_patch.training.trainer import Trainer

    with make_watchdog(run) as watchdog:
        device = init_distributed(run.options.engine.distributed_timeout_minutes)
        watchdog.listen()
        if settings.precision == "fp16" and device.type == "cpu":
            raise ConfigError("--fp16 on CPUs", "--bf16 or float32 there", "use --bf16, or a GPU")
        if settings.offloads_to_nvme:
            require_async_io()
        asked = stops.agreed(device)
        if asked is None:
            with Trainer(run, settings, device, stops, watchdog, callbacks) as trainer:
                code = trainer.train()
        else:
            code = ExitCode.PREEMPTED
        watchdog.heartbeat("the job is left")
        # Together: a launcher gives the others little time when the first rank has left, and some close more than others.
        barrier()
        # Not after an error: peers may be inside a collective, and leaving would wait for them.
        destroy_distributed()
    return code


def save_folder(run: RunConfig) -> Path | None:
    """The run's folder, if it has one."""
    return Path(run.options.checkpoint.save) if run.options.checkpoint.save else None


def make_watchdog(run: RunConfig) -> Watchdog:
    """This rank's watchdog."""
    return Watchdog(run.options.safety.hang_timeout, save_folder(run), ranks_from_environment()[0])


def engine_settings(run: RunConfig) -> EngineConfig:
    """DeepSpeed's part of a run.

    Raises:
        ConfigError: what does not go together.
    """
    settings = engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)
    if settings.precision == "bf16" and settings.zero_stage == 0 and run.options.engine.recompute_granularity != "none":
        raise ConfigError(
            "--bf16 with --zero-stage 0 and recomputation",
            "--zero-stage 1 to 3, or no recomputation",
            "use --zero-stage 1: it needs less memory",
        )
    return settings


def main(argv: Sequence[str] | None = None, callbacks: Sequence[CallbackFactory] = ()) -> int:
    """Runs the command line, prints an error in its three parts, and returns the exit code.

    A launcher script of a user registers extensions and calls this function.

    Args:
        argv: the flags; None: those of this process.
        callbacks: factories of further callbacks (`Callable[[CallbackContext], Callback]`), called on every rank once the model is built.
            A dry run does not call them.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank, local_rank, save = 0, 0, None
    try:
        rank, ranks, local_rank = ranks_from_environment()
        run = load_config(arguments, ranks)
        save = None if run.options.logging.dry_run else save_folder(run)
        code = pretrain(run, callbacks)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, rank, local_rank, save)
    else:
        if code != ExitCode.DONE and rank == 0:
            print_advice(code)
    flush_output()
    return int(code)
