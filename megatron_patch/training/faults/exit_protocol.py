"""How a run ends that does not end as it should: one rank tells it for all, on the screen and in SAVE/events.jsonl.

In: an error on this rank. Out: an exit code, the same on every rank that can still ask. An error on one rank breaks the connections of the
others, whose own errors then say little; so the first rank that ends leaves its word in the job's store before it goes, and those that
come after end with its code. Rank 0 keeps the store: where it has gone, the word is what events.jsonl ends with. Before the ranks have met,
a flag is most likely wrong on all of them: rank 0 tells it.
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

from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.utils.files import append_line

EVENTS = "events.jsonl"
STORE_KEY = "ending"
"""What the first rank that ends leaves in the job's store: its `ExitReport` as JSON."""
_STARTED = time.time()


@dataclass(frozen=True)
class ExitReport:
    """What one rank says of the job's end.

    Args:
        reason: kind of the error.
        message: for people.
        code: that the job ends with.
        rank: who says it.
        host: its node.
        time: seconds since 1970.
    """

    reason: str
    message: str
    code: int
    rank: int
    host: str
    time: float


def report_error(error: BaseException, rank: int, local_rank: int, save: Path | None) -> ExitCode:
    """Tells an error, unless another rank was first.

    Args:
        error: what ended this rank.
        rank: this rank.
        local_rank: its number on its node.
        save: the run's folder, if it has one.

    Returns:
        The code to exit with: the first rank's.
    """
    if isinstance(error, ConfigError) and not _joined():
        return _end_before_joining(error, rank, local_rank)
    if isinstance(error, MegatronPatchError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = ExitCode.INTERRUPTED, "a second interrupt"
    else:
        code, message = ExitCode.INTERNAL, "".join(traceback.format_exception(error)).rstrip()
    ending = _tell(_own(type(error).__name__, message, code, rank), save)
    if ending.rank != rank:
        if ending.message != message:
            last = str(error).strip().splitlines()
            print_stderr(f"rank {rank} ends with rank {ending.rank}: {type(error).__name__}: {last[0] if last else ''}")
        if ending.code == ExitCode.HANG and save is not None:
            write_stacks(save, rank, message)
    return ExitCode(ending.code)


def _joined() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.distributed.is_initialized()


def _end_before_joining(error: ConfigError, rank: int, local_rank: int) -> ExitCode:
    """Rank 0 tells it; every other node has a line, as it alone may lack a file or a package."""
    if rank == 0:
        print_stderr(f"ConfigError: {error}")
        print_advice(error.exit_code)
    elif local_rank == 0:
        print_stderr(f"rank {rank} on {socket.gethostname()}: ConfigError: {error.what}")
    return error.exit_code


def report_hang(message: str, rank: int, save: Path | None) -> ExitCode:
    """Tells a hang, unless another rank was first; to be called from another thread than the one that hangs.

    Args:
        message: what hangs, and for how long.
        rank: this rank.
        save: the run's folder, if it has one.

    Returns:
        The code to exit with.
    """
    return ExitCode(_tell(_own("hang", message, ExitCode.HANG, rank), save).code)


def report_of_peer(word: str | None, rank: int) -> ExitReport | None:
    """What another rank than this one has ended the job with, from its word to all."""
    ending = ExitReport(**json.loads(word)) if word is not None else None
    return ending if ending is not None and ending.rank != rank else None


def follow_peer_exit(ending: ExitReport | None, waiting: str, rank: int, save: Path | None) -> ExitCode:
    """Tells that this rank, which stands still, ends as another one has ended; to be called from another thread than the one that does.

    Args:
        ending: of the rank that ended first; None: rank 0 has gone, with all words.
        waiting: what this rank was doing.
        rank: this rank.
        save: the run's folder, if it has one.

    Returns:
        The code to exit with.
    """
    if ending is None:
        lost = "rank 0, which keeps all ranks' connections, has gone without a word"
        ending = _tell(_own("lost", lost, ExitCode.INTERNAL, rank), save)
    if ending.rank != rank:
        print_stderr(f"rank {rank} ends with rank {ending.rank}: it was left waiting {waiting}")
    return ExitCode(ending.code)


def write_stacks(save: Path, rank: int, text: str) -> Path:
    """Writes what a rank was doing to SAVE/stacks."""
    path = save / "stacks" / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def print_stderr(text: str) -> None:
    """A line on standard error, which may be on the very disk that is full: no reason to end otherwise."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_advice(code: ExitCode) -> None:
    """The last line of a run that is not done."""
    print_stderr(f"exit code {code.value}: {code.advice}")


def _own(reason: str, message: str, code: ExitCode, rank: int) -> ExitReport:
    return ExitReport(reason, message, code, rank, socket.gethostname(), round(time.time(), 3))


def _tell(mine: ExitReport, save: Path | None) -> ExitReport:
    """Says it, and returns what counts; where nobody knows who was first, each rank says its own.

    Before torch is imported no rank has met another: each says what it found, as files may be missing on its node alone.
    """
    joined = "torch" in sys.modules
    word: str | None = json.dumps(asdict(mine))
    if joined:
        from megatron_patch.engine.distributed import set_once

        word = set_once(STORE_KEY, json.dumps(asdict(mine)))
    with contextlib.ExitStack() as stack:
        if word is not None:
            ending = ExitReport(**json.loads(word))
        else:
            if save is not None:
                stack.enter_context(_alone(save))
            ending = _told(save) or mine
        if ending == mine and save is not None and (joined or mine.rank == 0):
            try:
                append_line(save / EVENTS, json.dumps({"type": "end", **asdict(mine)}))
            except OSError as error:
                print_stderr(f"{save / EVENTS}: {error}")
    if ending == mine:
        where = f"rank {mine.rank} on {mine.host}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        kind = "" if mine.code in (ExitCode.INTERNAL, ExitCode.HANG) else f"{mine.reason}: "
        print_stderr(f"{where}{kind}{mine.message}")
        print_advice(ExitCode(mine.code))
    return ending


@contextlib.contextmanager
def _alone(save: Path) -> Iterator[None]:
    """One rank after another, where the file system has locks."""
    try:
        file = (save / EVENTS).open("ab")
    except OSError:
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _told(save: Path | None) -> ExitReport | None:
    """What another rank of this job has said: the events' last end, if no start is behind it and it is younger than this process."""
    if save is None:
        return None
    try:
        lines = (save / EVENTS).read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if event["type"] == "start":
                return None
            if event["type"] == "end":
                ending = ExitReport(**{field.name: event[field.name] for field in fields(ExitReport)})
                return ending if ending.time >= _STARTED else None
        except (ValueError, KeyError, TypeError):
            continue
    return None
