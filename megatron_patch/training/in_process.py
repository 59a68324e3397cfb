"""Runs a job in a process that lives on: a notebook, or a script that trains several models one after another.

In: a resolved run and callbacks. Out: the records of the run, or its error; either way the process can start the next run, because process
groups, signal handlers, threads and environment variables are as they were before. The command line (pretrain.py) ends its process instead.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.engine.process_state import restored_process
from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.training.faults.exit_protocol import joined, record_error
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.training.pretrain import check_start, make_engine_config, train
from megatron_patch.utils.console import flush_output

if TYPE_CHECKING:
    from megatron_patch.training.callbacks.base import CallbackFactory
    from megatron_patch.training.callbacks.recorder import Recorder

_running = threading.Lock()
_groups_remain = threading.Event()
"""Set for good if the process groups of a failed job could not be destroyed."""


def run_in_process(run: RunConfig, callbacks: Sequence[CallbackFactory] = ()) -> Recorder:
    """Trains a run and leaves the process as it was; every rank of the job must call it.

    Args:
        run: the resolved run, for as many ranks as this job has.
        callbacks: factories of further callbacks.

    Returns:
        The records of the run; `end` is None if the run was asked to stop before its first step.

    Raises:
        MegatronPatchError: the run cannot start or continue.
        KeyboardInterrupt: the run was interrupted twice; the first interrupt asks it to save and stop.
    """
    if _groups_remain.is_set():
        raise MegatronPatchError(
            "an earlier run of this process has failed while other ranks waited for this one, so its process groups remain",
            "no run after the failure of one with several ranks",
            "start the script again; the same call resumes from the newest checkpoint",
        )
    if not _running.acquire(blocking=False):
        raise ConfigError(
            "another run is in progress in this process",
            "one run at a time, because torch.distributed has one default group",
            "wait for its end, or start the second run in another process",
        )
    try:
        with restored_process():
            return _run(run, callbacks)
    finally:
        _running.release()
        flush_output()


def _run(run: RunConfig, callbacks: Sequence[CallbackFactory]) -> Recorder:
    from megatron_patch.engine.distributed import leave_after_error
    from megatron_patch.training.callbacks.recorder import Recorder

    engine_config = make_engine_config(run)
    check_start(run)
    rank, size, _ = ranks_from_environment()
    recorder = Recorder(keeps_all=run.save_folder is None)
    stops = StopRequests(run.options.safety)
    # A single process that waits, as in a debugger, keeps no peer waiting, and its end would take the user's variables with it.
    watches = size > 1 or "hang_timeout" in run.origins
    watchdog = Watchdog(run.options.safety.hang_timeout if watches else 0, run.save_folder, rank)
    try:
        train(run, engine_config, stops, watchdog, [*callbacks, lambda context: recorder])
    except BaseException as error:
        if joined():
            record_error(error, rank, run.save_folder)
            if not leave_after_error():
                _groups_remain.set()
        raise
    finally:
        stops.close()
        sys.stdout.flush()
    return recorder
