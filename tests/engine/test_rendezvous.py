"""Ranks that do not find each other say so in a sentence with the address, and what to change."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import pytest
import torch

from megatron_patch.engine import rendezvous
from megatron_patch.engine.environment import free_port, local_world_size, rendezvous_address
from megatron_patch.engine.rendezvous import explained, notice_of_waiting, require_address
from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.exit_codes import ExitCode
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command, make_corpus, start_program


def _on_a_busy_port(argv):
    with socket.socket() as other:
        other.bind(("", int(os.environ["MASTER_PORT"])))
        other.listen()
        return start_program(argv)


def test_a_port_in_use_is_named_with_the_flag_that_changes_it(tmp_path):
    argv = command(MODEL, DATA, "--seq-length 16 --global-batch-size 12 --train-tokens 3000 --data-path", make_corpus(tmp_path / "walks"))
    assert run_ranks(_on_a_busy_port, 1, tmp_path / "logs", [*argv, "--save", str(tmp_path / "run")]) == [ExitCode.CONFIG]
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "127.0.0.1, is in use by another program" in text and "Allowed: " in text and "--master_port" in text
    assert "Traceback" not in text and text.splitlines()[-1].startswith("exit code 2: ")
    assert not (tmp_path / "run").exists()


def test_the_errors_of_torch_are_known():
    """The real ones, so that another version of torch with other texts is noticed."""
    port, short = free_port(), timedelta(seconds=1)
    # The store binds to IPv6 where it can, which a socket of IPv4 alone does not always prevent.
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual), pytest.raises(RuntimeError) as busy:
        torch.distributed.TCPStore("127.0.0.1", port, 2, True, timeout=short)
    error = explained(busy.value, "node7", port, 2)
    assert isinstance(error, ConfigError) and f"port {port} of rank 0's node, node7" in error.what and "MASTER_PORT" in error.do
    with pytest.raises(RuntimeError) as missing:
        torch.distributed.TCPStore("127.0.0.1", free_port(), 2, True, timeout=short)
    error = explained(missing.value, "node7", port, 2)
    assert type(error) is MegatronPatchError and f"not all of the 2 ranks have joined the job at node7:{port}" in error.what
    with pytest.raises(RuntimeError) as absent:
        torch.distributed.TCPStore("127.0.0.1", free_port(), 2, False, timeout=short)
    error = explained(absent.value, "node7", port, 2)
    assert isinstance(error, ConfigError) and f"cannot reach rank 0 at node7:{port}" in error.what and error.allowed and error.do
    assert explained(ValueError("something else"), "node7", port, 2) is None


def test_a_name_that_nobody_knows_is_refused_after_a_while(monkeypatch, capsys):
    def unknown(*args, **more):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="MASTER_ADDR=nowhere, cannot be resolved on .*: Name or service not known") as refused:
        require_address("nowhere", 29500, seconds=0.05)
    assert refused.value.allowed and "--master_addr" in refused.value.do
    assert capsys.readouterr().err.count("cannot be resolved yet") == 1


def test_a_name_that_is_known_later_is_waited_for(monkeypatch):
    answers = iter([socket.gaierror(-2, "not yet"), UnicodeError("label too long"), None])

    def soon(*args, **more):
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", soon)
    require_address("node7", 29500, seconds=2.0)


@pytest.mark.parametrize("listening", [True, False])
def test_a_rank_that_waits_says_for_whom(listening, capfd):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if listening:
            server.listen()
        with notice_of_waiting("127.0.0.1", port, 3, 8, seconds=0.01):
            watching = [thread for thread in threading.enumerate() if thread.name == "notice of waiting"][-1]
            watching.join(30)
    # Read once: what a thread writes while pytest reads is lost.
    printed = capfd.readouterr().err
    assert "rank 3 on " in printed and "for 8 ranks to join" in printed
    assert (f"rank 0 answers at 127.0.0.1:{port}" if listening else f"nothing listens at 127.0.0.1:{port}") in printed


def test_nothing_is_said_if_the_ranks_join_soon(capfd):
    with notice_of_waiting("127.0.0.1", 1, 0, 2, seconds=5.0):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "1e4", "９", "1" * 5000, " 80"])
@pytest.mark.parametrize("size", ["1", "2"])
def test_what_is_no_port_is_refused(port, size, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0", "MASTER_ADDR": "node7", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_PORT=.* is not a port") as refused:
        rendezvous_address()
    assert refused.value.allowed and "--master_port" in refused.value.do and len(str(refused.value)) < 300


@pytest.mark.parametrize("value", ["abc", "0", "-2", "1e3", "9" * 5000])
def test_what_is_no_number_of_local_ranks_is_refused(value, monkeypatch):
    for name, given in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": value}.items():
        monkeypatch.setenv(name, given)
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE=.* is not a number of ranks"):
        local_world_size()
