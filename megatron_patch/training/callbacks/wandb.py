"""Sends values to Weights & Biases; a resumed run continues in the same chart.

In: values over tokens. Out: a run of a W&B project. If W&B cannot be reached at the start (no login, no network), the run is written to a
folder that `wandb sync` uploads later.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.credentials import without_credentials
from megatron_patch.errors import ConfigError
from megatron_patch.training.faults.exit_protocol import print_stderr
from megatron_patch.utils.files import make_folder, read_small, write_durably

_ID = re.compile("[A-Za-z0-9_-]{1,64}")
_LONGEST_ID = 1000


class WeightsAndBiases:
    """A `ChartWriter` that logs to a run of a W&B project.

    Args:
        project: name of the project.
        name: name of the run, or None.
        save: the run's folder (--save), which keeps the W&B run id and, unless WANDB_DIR is set, W&B's files; None: every start is a new
            W&B run.
        config: values shown with the run.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    def __init__(self, project: str, name: str | None, save: Path | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "--wandb-project needs the package wandb, which is not installed",
                "an environment with the package wandb",
                "pip install 'megatron_patch[wandb]'",
            ) from error
        self.name = "Weights & Biases"
        self._wandb: Any = wandb
        self._settings: dict[str, Any] = {"project": project, "name": name, "config": dict(config)}
        if save is not None and "WANDB_DIR" not in os.environ:
            self._settings["dir"] = str(save)
        self._save = save
        self._run: Any = None

    def _run_id(self) -> str:
        if self._save is None:
            return uuid.uuid4().hex[:12]
        path = self._save / "wandb_run_id"
        try:
            # The id becomes part of addresses and paths.
            if _ID.fullmatch(found := read_small(path, _LONGEST_ID).decode().strip()):
                return found
        except (OSError, ValueError):
            make_folder(path.parent)
        write_durably(path, (made := uuid.uuid4().hex[:12]) + "\n")
        return made

    def open(self, drop_after: int | None) -> None:
        """Opens the run, or resumes it if the run's folder has its id; offline if W&B cannot be reached. W&B cannot drop values."""
        run_id = self._run_id()
        try:
            self._run = self._wandb.init(id=run_id, resume="allow", **self._settings)
        except self._wandb.Error as error:
            self._run = self._wandb.init(id=run_id, mode="offline", **self._settings)
            reason = without_credentials(str(error)).splitlines()[0].rstrip(".")
            folder = Path(self._run.dir).parent
            print_stderr(f"{self.name} cannot be reached: {reason}; the run is logged to a folder, which this uploads: wandb sync {folder}")
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Logs values; a process of wandb uploads them and retries if the network fails."""
        self._run.log({"tokens": tokens, **values})

    def close(self) -> None:
        """Finishes the run."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()
