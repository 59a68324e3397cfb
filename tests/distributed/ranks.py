"""Real ranks for tests: processes forked from one server that has already imported torch and DeepSpeed; each job has its own port."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.engine.environment import free_port

_PRELOAD = [
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "megatron_patch.training.trainer",
    "megatron_patch.training.pretrain",
]
_context = multiprocessing.get_context("forkserver")


_SERVER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def start_server(environment: Mapping[str, str] | None = None) -> Any:
    """Starts the fork server, with environment variables that this process does not keep, and returns its multiprocessing context.

    A process has only one fork server, and the first start decides what the server has imported. So tests/conftest.py calls this first.

    Args:
        environment: further variables of the server, if this call is the first.
    """
    variables = {**_SERVER_ENVIRONMENT, **(environment or {})}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _context.set_forkserver_preload(_PRELOAD)
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return _context


@atexit.register
def _end_what_is_left() -> None:
    """Kills ranks that a failed test left running, because Python would wait for them at exit."""
    for process in multiprocessing.active_children():
        process.kill()


def _rank_main(rank: int, size: int, port: int, log: str, function: Callable[..., Any], args: Sequence[Any], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            results.put((rank, True, function(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def start_ranks(function: Callable[..., Any], size: int, logs: Path, *args: Any) -> tuple[list[Any], Any]:
    """Starts `function(*args)` on `size` ranks; returns (processes, queue of (rank, ok, value))."""
    context = start_server()
    logs.mkdir(parents=True, exist_ok=True)
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, size, port, str(logs / f"rank-{rank}.log"), function, args, results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_ranks(function: Callable[..., Any], size: int, logs: Path, *args: Any, timeout: float = 200.0) -> list[Any]:
    """Runs `function(*args)` on `size` ranks and returns their results in order.

    Raises:
        RuntimeError: a rank failed, died or took too long; the message has its traceback and its output.
    """
    processes, results = start_ranks(function, size, logs, *args)
    values: dict[int, Any] = {}
    failure: str | None = None
    end = time.monotonic() + timeout
    while len(values) < size and failure is None:
        try:
            rank, ok, value = results.get(timeout=0.2)
            values[rank] = value
            failure = None if ok else f"rank {rank}:\n{value}"
        except Exception:
            dead = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0) and r not in values]
            if dead:
                failure = f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}"
            elif time.monotonic() > end:
                failure = f"no result after {timeout} seconds"
    for process in processes:
        process.join(timeout=0.1 if failure else 20)
        if process.is_alive():
            process.kill()
            process.join()
    if failure:
        # A rank that had not begun when another one failed has no log.
        found = [(r, path) for r in range(size) if (path := logs / f"rank-{r}.log").exists()]
        printed = "\n".join(f"[rank {r}] {path.read_text()[-3000:]}" for r, path in found)
        raise RuntimeError(f"{failure}\n{printed}")
    return [values[rank] for rank in range(size)]
