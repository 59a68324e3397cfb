"""Says at the end of a run which tests were skipped, and the command that lets each run; continuous integration fails on a skip.

A plugin of pytest, which tests/conftest.py registers. With `MEGATRON_PATCH_CI` set, as `.ci/run` does, a skip whose reason is not in
`ALLOWED` fails the run, because a test that nobody runs proves nothing.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

ALLOWED = ("needs a CUDA device", "needs torchtitan")
"""Reasons that a machine for continuous integration cannot remove."""
APT = "apt-get install --no-install-recommends"
COMMANDS = {
    "torchtitan": "pip install --no-deps torchtitan==0.2.2 torchdata triton",
    "CUDA device": "python -m pytest -m gpu -n 0, on a machine with a GPU",
    "Slurm is not installed": f"{APT} slurmctld slurmd slurm-client munge",
    "Slurm cluster": "run the tests as root",
    "mount namespaces": "run the tests on a machine or in a container that allows them, such as docker run --privileged",
    "mount a file system": "run the tests as root",
    "async_io": f"{APT} libaio-dev && make nvme",
    "Chromium": f"{APT} chromium",
    "nvcc": "install g++ and NVIDIA's CUDA toolkit, with nvcc on the PATH",
    "compiler": f"{APT} g++",
    "compiled operators": f"{APT} g++ && touch setup.py && make venv",
    "_C is not built": f"{APT} g++ && touch setup.py && make venv",
    "could not import": "touch pyproject.toml && make venv",
    "mkdocs": "touch pyproject.toml && make venv",
}
"""Part of a skip's reason -> what lets the test run."""


def _skipped(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Returns how many tests were skipped for each reason."""
    reasons = (report.longrepr[2] for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple))
    return Counter(reason.removeprefix("Skipped: ") for reason in reasons)


def _refused(config: pytest.Config) -> Counter[str]:
    """Returns the skips that fail this run: none outside of continuous integration."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("MEGATRON_PATCH_CI"):
        return Counter()
    return Counter({reason: count for reason, count in _skipped(reporter).items() if not reason.startswith(ALLOWED)})


# The outermost wrapper, so that these lines come after pytest's own.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> object:
    """Prints the skipped tests by reason, each with the command that lets them run."""
    result = yield  # type: ignore[misc]
    refused = _refused(config)
    for reason, count in sorted(_skipped(terminalreporter).items()):
        command = next((command for part, command in COMMANDS.items() if part in reason), "see the test")
        terminalreporter.write_line(
            f"{count} skipped: {reason}\n    to run: {command}", red=reason in refused, yellow=reason not in refused
        )
    if refused:
        terminalreporter.write_line(f"{sum(refused.values())} of them fail this run, because MEGATRON_PATCH_CI is set", red=True)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run for a skip that is not allowed."""
    if session.exitstatus == pytest.ExitCode.OK and _refused(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
