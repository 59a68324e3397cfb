"""Sends values to Weights & Biases; a resumed run continues in the same chart.

In: steps and evaluations. Out: a run of a W&B project, with values over tokens. If W&B cannot be used at the start (no login, no network),
the run is written to a folder that `wandb sync` uploads later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.exit_codes import ExitCode
from megatron_patch.requirements import missing_package
from megatron_patch.training.callbacks.base import EvaluationRecord, RunEnd, RunStart, StepRecord
from megatron_patch.training.callbacks.charts import PATIENCE, named_values
from megatron_patch.training.callbacks.delivery import Timed
from megatron_patch.training.callbacks.run_ids import new_id, read_id, write_id
from megatron_patch.training.callbacks.servers import not_reached, why
from megatron_patch.training.faults.exit_protocol import print_stderr


class WeightsAndBiases:
    """A `Service` that logs to a run of a W&B project.

    Args:
        project: name of the project.
        name: name of the run, or None.
        save: the run's folder (--save), which keeps the W&B run id and, unless WANDB_DIR is set, W&B's files; None: every start is a new
            W&B run.
        config: values shown with the run.
        patience: seconds for W&B's server to answer, to start the run, and to take the last values.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    name = "Weights & Biases"
    records: tuple[type, ...] = (StepRecord, EvaluationRecord)

    def __init__(self, project: str, name: str | None, save: Path | None, config: Mapping[str, Any], patience: float = PATIENCE) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_package("wandb", f"--wandb-project {project}") from error
        self._wandb: Any = wandb
        self._arguments: dict[str, Any] = {"project": project, "name": name, "config": dict(config)}
        if save is not None and "WANDB_DIR" not in os.environ:
            self._arguments["dir"] = str(save)
        self._save, self._patience = save, patience
        self._run: Any = None

    def _run_id(self) -> str:
        if self._save is None:
            return new_id()
        path = self._save / "wandb_run_id"
        if (run_id := read_id(path)) is None:
            write_id(path, run_id := new_id())
        return run_id

    def _unusable(self) -> str | None:
        """Returns why W&B's server cannot be used, or None; without this check, `wandb.init` asks for a login or tries for minutes."""
        import requests

        settings = self._wandb.setup().settings
        if settings.mode not in ("online", "shared"):
            return None
        proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
        try:
            # Whatever the server answers, wandb decides what it means.
            requests.head(settings.base_url, timeout=self._patience, proxies={kind: proxy for kind, proxy in proxies.items() if proxy})
        except requests.exceptions.RequestException as error:
            if (reason := not_reached(error, settings.base_url, self._patience)) is not None:
                return reason
        # With a run in this process wandb has a login.
        if self._wandb.run is None and not self._wandb.login(prompt=False, verify=False):
            return "there is no login (wandb login, or WANDB_API_KEY)"
        return None

    def open(self, start: RunStart | None) -> None:
        """Opens the run, or resumes it if the run's folder has its id; offline if W&B cannot be used. W&B cannot drop values."""
        run_id = self._run_id()
        limits: dict[str, Any] = {"finish_timeout": self._patience, "finish_timeout_raises": True}
        if "WANDB_QUIET" not in os.environ:
            limits["quiet"] = True  # the history and summary that wandb prints at the end would hide the run's own last lines
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            limits["init_timeout"] = self._patience
        settings = self._wandb.Settings(**limits)
        if (reason := self._unusable()) is None:
            try:
                self._run = self._wandb.init(id=run_id, resume="allow", settings=settings, **self._arguments)
            except Exception as error:
                reason = why(error)
                self.abandon()
        if reason is not None:
            self._run = self._wandb.init(id=run_id, mode="offline", settings=settings, **self._arguments)
            print_stderr(
                f"{self.name} cannot be used: {reason}; training continues, and the run is logged to a folder, "
                f"which this uploads: wandb sync {self._folder}"
            )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    @property
    def _folder(self) -> Path:
        return Path(self._run.dir).parent

    def add(self, records: Sequence[Timed]) -> None:
        """Logs the values; a process of wandb uploads them and retries if the network fails."""
        for timed in records:
            self._run.log({"tokens": timed.record.tokens, **named_values(timed.record)})

    def abandon(self) -> None:
        """Ends wandb's process, which otherwise refuses the id of the run."""
        self._run = None
        self._wandb.teardown()

    def close(self, end: RunEnd | None) -> None:
        """Finishes the run.

        Raises:
            RuntimeError: W&B's server does not take the last values.
        """
        try:
            self._run.finish(exit_code=ExitCode.DONE if end is not None else ExitCode.INTERNAL)
        except TimeoutError as error:
            folder = self._folder
            raise RuntimeError(f"the server did not take them within {self._patience:g} s; wandb sync {folder} uploads them") from error
