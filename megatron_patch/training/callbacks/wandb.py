"""Weights & Biases; a resumed run goes on in the same chart. In: values over tokens. Out: a run there.

Where the service is not to be had at a start (no login, no network), the run is written to a folder that can be sent later.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.training.faults.exit_protocol import print_stderr


class WeightsAndBiases:
    """A run of a project, as a `ChartWriter`.

    Args:
        project: its name.
        name: of the run, or None.
        save: the run's folder, which keeps the run's id and, unless WANDB_DIR says otherwise, the service's files; None: every start is a
            new run.
        config: shown with the run.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, project: str, name: str | None, save: Path | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb-project without wandb", "pip install 'megatron_patch[wandb]'", "install it") from error
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
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12] + "\n")
        return path.read_text().strip()

    def open(self, resumed_at: int) -> None:
        """Opens or resumes the run."""
        run_id = self._run_id()
        try:
            self._run = self._wandb.init(id=run_id, resume="allow", **self._settings)
        except self._wandb.Error as error:
            self._run = self._wandb.init(id=run_id, mode="offline", **self._settings)
            reason = str(error).splitlines()[0].rstrip(".")
            folder = Path(self._run.dir).parent
            print_stderr(f"{self.name} is not to be had: {reason}; the run is written to a folder: wandb sync {folder} sends it")
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Values; a process of the package sends them, and tries again where the network fails."""
        self._run.log({"tokens": tokens, **values})

    def close(self) -> None:
        """Ends the run."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()
