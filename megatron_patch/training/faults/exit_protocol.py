"""Ends a run that fails: one rank reports the error for all, on standard error and in SAVE/events.jsonl.

In: an error on this rank. Out: an exit code, the same on every rank that can still reach the others.

An error on one rank breaks the connections of its peers, whose own errors then explain little. Therefore the first rank that fails puts
its report into the job's store before it exits, and ranks that fail later exit with the code of that report. Rank 0 keeps the store: if its
process has exited, later ranks read the report from the end of events.jsonl. An error of the configuration before the ranks have joined the
job is most likely the same on all ranks, so that rank 0 reports it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_patch.credentials import without_credentials
from megatron_patch.errors import ConfigError, DataError, MegatronPatchError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.utils.console import print_lines
from megatron_patch.utils.files import append_line, open_in_place, open_new

EVENTS = "events.jsonl"
STORE_KEY = "exit_report"
"""Key in the job's store under which the first rank that fails puts its `ExitReport` as JSON."""
_TAIL_BYTES = 1 << 20
_PROCESS_STARTED = time.time()
_SERVE_SECONDS = 25.0  # longer than peers need to notice an exit in a collective on GPUs (watchdog.py)


@dataclass(frozen=True)
class ExitReport:
    """A rank's report of why the job ends.

    Args:
        reason: name of the error's class, "hang" or "lost".
        message: the message for the user.
        code: exit code of the job.
        rank: the rank that reports.
        host: the name of its node.
        time: seconds since 1970.
    """

    reason: str
    message: str
    code: int
    rank: int
    host: str
    time: float


def report_error(error: BaseException, rank: int, local_rank: int, save: Path | None) -> ExitCode:
    """Reports the error that ended this rank, unless a peer failed first.

    Args:
        error: the error.
        rank: this rank.
        local_rank: its number on its node.
        save: the run's folder, or None.

    Returns:
        The exit code of the rank that failed first.
    """
    # A file may be missing on some nodes only; rank 0 reports its own error of the data below, also to events.jsonl.
    if isinstance(error, (ConfigError, DataError)) and not joined() and (rank != 0 or isinstance(error, ConfigError)):
        return _report_before_joining(error, rank, local_rank)
    local = _report_of_error(error, rank)
    report = _report_once(local, save)
    if report.rank != rank:
        if report.message != local.message:
            last = without_credentials(str(error)).strip().splitlines()
            print_stderr(f"rank {rank} exits after rank {report.rank}: {type(error).__name__}: {last[0] if last else ''}")
        if report.code == ExitCode.HANG and save is not None:
            write_stacks(save, rank, local.message)
    return ExitCode(report.code)


def record_error(error: BaseException, rank: int, save: Path | None) -> None:
    """Does what `report_error` does for a caller that raises the error: writes it to events.jsonl and lets peers know.

    Prints it only if there are peers, whose own errors explain little.

    Args:
        error: the error that ended this rank, which has joined the job.
        rank: this rank.
        save: the run's folder, or None.
    """
    _report_once(_report_of_error(error, rank), save, alone=int(os.environ.get("WORLD_SIZE", "1")) == 1)


def _report_of_error(error: BaseException, rank: int) -> ExitReport:
    if isinstance(error, MegatronPatchError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = ExitCode.INTERRUPTED, "interrupted a second time"
    else:
        code, message = ExitCode.INTERNAL, without_credentials("".join(traceback.format_exception(error)).rstrip())
    return _local_report(type(error).__name__, message, code, rank)


def joined() -> bool:
    """Returns whether this rank has joined the job."""
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.distributed.is_initialized()


def _report_before_joining(error: ConfigError | DataError, rank: int, local_rank: int) -> ExitCode:
    """Prints the full error on rank 0, and one line for every other node, since only that node may lack a file or a package."""
    if rank == 0:
        print_stderr(f"ConfigError: {error}")
        print_advice(error.exit_code)
    elif local_rank == 0:
        print_stderr(f"rank {rank} on {socket.gethostname()}: {type(error).__name__}: {error.what}")
    return error.exit_code


def report_hang(message: str, rank: int, save: Path | None) -> ExitCode:
    """Reports a hang, unless a peer failed first; called from another thread than the one that hangs.

    Args:
        message: which activity hangs, and for how long.
        rank: this rank.
        save: the run's folder, or None.

    Returns:
        The exit code of the rank that failed first.
    """
    return ExitCode(_report_once(_local_report("hang", message, ExitCode.HANG, rank), save).code)


def report_of_peer(text: str | None, rank: int) -> ExitReport | None:
    """Returns the report in the job's store if a peer put it there, otherwise None.

    Args:
        text: the report as JSON, or None if the store has none.
        rank: this rank.
    """
    report = ExitReport(**json.loads(text)) if text is not None else None
    return report if report is not None and report.rank != rank else None


def follow_peer_exit(report: ExitReport | None, activity: str, rank: int, save: Path | None) -> ExitCode:
    """Reports that this rank exits because a peer has; called from another thread than the one that waits for the peer.

    Args:
        report: the report of the peer that failed first; None: rank 0 has exited, and the store with it.
        activity: what this rank was doing, as in "while step 5 is being computed".
        rank: this rank.
        save: the run's folder, or None.

    Returns:
        The exit code of the rank that failed first.
    """
    if report is None:
        lost = "rank 0, which keeps all connections of the job, has exited without a report"
        report = _report_once(_local_report("lost", lost, ExitCode.INTERNAL, rank), save)
    if report.rank != rank:
        print_stderr(f"rank {rank} exits after rank {report.rank}: it waited for that rank {activity}")
    return ExitCode(report.code)


def write_stacks(save: Path, rank: int, text: str) -> Path:
    """Writes what a rank was doing to SAVE/stacks and returns the path of the file."""
    path = save / "stacks" / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_new(path, "w") as file:
        file.write(text + "\n")
    return path


def print_stderr(text: str) -> None:
    """Prints a message to standard error; a full disk below it is ignored, so that the exit code stays the same."""
    with contextlib.suppress(OSError):
        print_lines(text, stderr=True)


def print_advice(code: ExitCode) -> None:
    """Prints the last line of a run that is not done: its exit code and what to do."""
    print_stderr(f"exit code {code.value}: {code.advice}")


def _local_report(reason: str, message: str, code: ExitCode, rank: int) -> ExitReport:
    return ExitReport(reason, message, code, rank, socket.gethostname(), round(time.time(), 3))


def _report_once(local: ExitReport, save: Path | None, alone: bool = False) -> ExitReport:
    """Publishes this rank's report unless a peer published one before, and returns the report that was published first.

    Prints it too, unless this rank is `alone`: then the caller raises the error.

    If the store cannot be reached and events.jsonl has no report either, each rank publishes its own. The same holds before torch is
    imported, when ranks do not know each other and a file may be missing on only one node.
    """
    torch_imported, written = "torch" in sys.modules, True
    text: str | None = json.dumps(asdict(local))
    if torch_imported:
        from megatron_patch.engine.distributed import set_once

        text = set_once(STORE_KEY, json.dumps(asdict(local)))
    with contextlib.ExitStack() as stack:
        if text is not None:
            report = ExitReport(**json.loads(text))
        else:
            if save is not None:
                stack.enter_context(_events_locked(save))
            report = _last_report(save) or local
        if report == local and save is not None and (torch_imported or local.rank == 0):
            try:
                append_line(save / EVENTS, json.dumps({"type": "end", **asdict(local)}))
            except OSError as error:
                print_stderr(f"cannot write {save / EVENTS}: {error}")
                written = False
    if report == local and not alone:
        where = f"rank {local.rank} on {local.host}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        kind = "" if local.code in (ExitCode.INTERNAL, ExitCode.HANG) else f"{local.reason}: "
        print_stderr(f"{where}{kind}{local.message}")
        print_advice(ExitCode(local.code))
    if torch_imported and local.rank == 0 and not written:
        from megatron_patch.engine.distributed import serve_until_read

        # The store, which ends with this process, has the only copy of the report.
        serve_until_read(STORE_KEY, _SERVE_SECONDS)
    return report


@contextlib.contextmanager
def _events_locked(save: Path) -> Iterator[None]:
    """Lets one rank at a time read and write events.jsonl, if the file system supports locks."""
    try:
        file = open_in_place(save / EVENTS, "ab")
    except OSError:
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_report(save: Path | None) -> ExitReport | None:
    """Returns the report of a peer in events.jsonl: its last "end" if no "start" follows it and it is newer than this process."""
    if save is None:
        return None
    try:
        with open_in_place(save / EVENTS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if event["type"] == "start":
                return None
            if event["type"] == "end":
                report = ExitReport(**{field.name: event[field.name] for field in fields(ExitReport)})
                return report if report.time >= _PROCESS_STARTED else None
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
