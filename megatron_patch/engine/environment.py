"""Which of how many ranks this process is: RANK, WORLD_SIZE and LOCAL_RANK as launchers set them. No torch here."""

from __future__ import annotations

import os

from megatron_patch.errors import ConfigError


def ranks_of_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) that the launcher gave this process; without a launcher (0, 1, 0).

    Raises:
        ConfigError: variables that are no numbers or contradict each other.
    """
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    try:
        rank, size, local = (int(os.environ.get(name, default)) for name, default in names)
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}", "what a launcher sets") from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={size}", "ranks below the world size", "start the job with a launcher")
    return rank, size, local
