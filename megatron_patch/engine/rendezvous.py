"""What can go wrong before the ranks have found each other, said in a sentence. No torch here.

In: the address of rank 0, and the errors of torch. Out: errors that name the address and what to change, and a notice if ranks wait long.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import format_duration, plural

_RESOLVE_SECONDS = 60.0  # in which the name service of a cluster learns the name of a node that has just started
_NOTICE_SECONDS = 60.0
_PROBE_SECONDS = 5.0
_ALLOWED_ADDRESS = "a name or an address of rank 0's node that every node can reach"
_OTHER_ADDRESS = "check MASTER_ADDR, or the launcher's --master_addr (deepspeed, torchrun)"
_OTHER_PORT = "choose another port: --master_port of deepspeed and torchrun, or MASTER_PORT; or end the program that uses it"


def require_address(address: str, port: int, seconds: float = _RESOLVE_SECONDS) -> None:
    """Waits until the name of rank 0's node can be resolved.

    Args:
        address: the name or address.
        port: the port.
        seconds: how long to wait at most.

    Raises:
        ConfigError: the name is still unknown then.
    """
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() >= end:
            raise ConfigError(
                f"the address of rank 0, MASTER_ADDR={address[:80]}, cannot be resolved on {socket.gethostname()}: {reason}",
                _ALLOWED_ADDRESS,
                _OTHER_ADDRESS,
            )
        if not told:
            _print(f"MASTER_ADDR={address[:80]} cannot be resolved yet ({reason}); this rank tries again for {format_duration(seconds)}")
            told = True
        time.sleep(min(1.0, seconds / 10))


def explained(error: Exception, address: str, port: int, size: int) -> MegatronPatchError | None:
    """Returns the error that says why the ranks did not find each other, or None if it is something else.

    Args:
        error: what torch raised while this rank joined.
        address: the address of rank 0.
        port: its port.
        size: number of ranks.
    """
    text, where = str(error), f"{address}:{port}"
    if "EADDRINUSE" in text:
        return ConfigError(f"port {port} of rank 0's node, {address}, is in use by another program", "a free port", _OTHER_PORT)
    if "EACCES" in text or "permission denied" in text.lower():
        return ConfigError(f"rank 0 may not listen on port {port}", "a port from 1,024 to 65,535", _OTHER_PORT)
    if "Timed out" in text and "clients" in text:
        return MegatronPatchError(
            f"not all of the {plural(size, 'rank')} have joined the job at {where} in time: {text.splitlines()[0][:200]}",
            "all ranks started, with the same MASTER_ADDR and MASTER_PORT",
            "look for the rank that did not start, and for a firewall between the nodes",
        )
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        return ConfigError(f"cannot reach rank 0 at {where}: {text.splitlines()[0][:200]}", _ALLOWED_ADDRESS, _OTHER_ADDRESS)
    return None


@contextlib.contextmanager
def notice_of_waiting(address: str, port: int, rank: int, size: int, seconds: float = _NOTICE_SECONDS) -> Iterator[None]:
    """Prints what this rank waits for if the body takes longer than `seconds`.

    Args:
        address: the address of rank 0.
        port: its port.
        rank: this rank.
        size: number of ranks.
        seconds: the time after which it is printed.
    """
    joined = threading.Event()

    def watch() -> None:
        if not joined.wait(seconds):
            found = _probe(address, port)
            if not joined.is_set():
                waited = format_duration(seconds)
                _print(f"rank {rank} on {socket.gethostname()} has waited {waited} for {plural(size, 'rank')} to join: {found}")

    threading.Thread(target=watch, name="notice of waiting", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _probe(address: str, port: int) -> str:
    """Returns whether rank 0 can be reached, as a clause."""
    try:
        with socket.create_connection((address, port), _PROBE_SECONDS):
            return f"rank 0 answers at {address}:{port}, so others have not started or cannot reach it"
    except ConnectionRefusedError:
        return f"nothing listens at {address}:{port}, so rank 0 has not started, or runs on another node than MASTER_ADDR says"
    except OSError as error:
        return f"{address}:{port} cannot be reached ({error.strerror or error}): check MASTER_ADDR and the firewall"


def _print(text: str) -> None:
    with contextlib.suppress(OSError):
        print_line(text, stderr=True)
