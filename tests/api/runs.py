"""A tiny run in Python's words, and the state of a process that a run must leave as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "seq_length": 16,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "patch_size": 4,
    "train_tokens": 1536,
    "lr": 1e-3,
    "split": "90,10,0",
    "eval_tokens": 512,
    "seed": 7,
    "shuffle_window_blocks": 16,
    "num_workers": 1,
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_launcher() -> None:
    """Removes the variables by which the pool of tests makes this process a rank."""
    for name in LAUNCHER:
        os.environ.pop(name, None)


def process_state() -> dict[str, Any]:
    """Returns what a run changes in its process while it runs."""
    import deepspeed
    import torch

    umask = os.umask(0o077)
    os.umask(umask)
    return {
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hook": sys.excepthook,
        "umask": umask,
        "threads of torch": torch.get_num_threads(),
        "random numbers": torch.get_rng_state().tolist(),
        "timeout": torch.distributed.distributed_c10d.default_pg_timeout,
        "group": torch.distributed.is_initialized(),
        "groups": list(torch.distributed.distributed_c10d._world.pg_map),
        "DeepSpeed's groups": deepspeed.utils.groups._WORLD_GROUP,
        "log level": deepspeed.utils.logger.level,
        "operators": deepspeed.ops.__compatible_ops__,
    }


def left_threads(before: set[threading.Thread]) -> list[str]:
    """Returns the names of the threads that were not there before and do not end."""
    new = [thread for thread in threading.enumerate() if thread not in before]
    for thread in new:
        thread.join(10)
    return [thread.name for thread in new if thread.is_alive()]


def corpus_in(folder: Path) -> str:
    """Writes a small corpus and returns its prefix."""
    from tests.distributed.runs import make_corpus

    folder.mkdir(exist_ok=True)
    return make_corpus(folder / "walks", documents=120)
