"""Sends values to MLflow; a resumed run continues in the same MLflow run.

In: steps and evaluations. Out: a run of an MLflow experiment, whose steps are tokens, with the options as parameters.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.requirements import missing_package
from megatron_patch.training.callbacks.base import EvaluationRecord, RunEnd, RunStart, StepRecord
from megatron_patch.training.callbacks.charts import PATIENCE, named_values
from megatron_patch.training.callbacks.delivery import Timed
from megatron_patch.training.callbacks.run_ids import read_id, write_id
from megatron_patch.training.callbacks.servers import not_reached

_VALUES_A_REQUEST = 1000  # MLflow's limits
_PARAMETERS_A_REQUEST = 100
_LONGEST_VALUE = 6000
_LONGEST_NAME = 250
_NOT_IN_NAMES = re.compile(r"[^\w/.\- ]|(?<=/)(?=/|$)|(?<![^/])\.{1,2}(?![^/])")


class MLflow:
    """A `Service` that logs to a run of an MLflow experiment.

    Args:
        experiment: name of the experiment, which is created if it does not exist.
        uri: address of the tracking server, or None: that of MLFLOW_TRACKING_URI.
        name: name of the run, or None: MLflow makes one up.
        save: the run's folder (--save), which keeps the MLflow run id; None: every start is a new MLflow run.
        parameters: the options of the run.
        patience: seconds for the server to answer one request.

    Raises:
        ConfigError: the package mlflow-skinny is not installed, or no address of a server is known.
    """

    name = "MLflow"
    records: tuple[type, ...] = (StepRecord, EvaluationRecord)

    def __init__(
        self,
        experiment: str,
        uri: str | None,
        name: str | None,
        save: Path | None,
        parameters: Mapping[str, Any],
        patience: float = PATIENCE,
    ) -> None:
        if uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                f"--mlflow-experiment {experiment} without the address of a tracking server",
                "--mlflow-tracking-uri, or MLFLOW_TRACKING_URI in the environment",
                "give --mlflow-tracking-uri http://HOST:5000",
            )
        address = uri or os.environ["MLFLOW_TRACKING_URI"]
        if (
            address.startswith("file:") or ("://" not in address and address != "databricks")
        ) and "MLFLOW_ALLOW_FILE_STORE" not in os.environ:
            raise ConfigError(
                f"--mlflow-tracking-uri {address} is a folder, which MLflow no longer writes to",
                "the address of a tracking server: http://HOST:5000",
                "start one with mlflow server, or set MLFLOW_ALLOW_FILE_STORE=true",
            )
        # By default, MLflow asks a server that does not answer 8 times, for 120 s each, and reports its use to its makers.
        for variable, value in (
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", str(math.ceil(patience))),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ):
            os.environ.setdefault(variable, value)
        try:
            import mlflow
            import mlflow.entities
        except ImportError as error:
            raise missing_package("mlflow", f"--mlflow-experiment {experiment}") from error
        self._mlflow: Any = mlflow
        self._experiment, self._uri, self._save = experiment, uri, save
        self._run_name = name
        self._parameters = {key: _text(value) for key, value in parameters.items()}
        self._client: Any = None
        self._run_id = ""

    def open(self, start: RunStart | None) -> None:
        """Opens the run, or resumes it if the run's folder has the id of one that the server knows. MLflow cannot drop values."""
        with self._plain_errors():
            self._open(self._mlflow.MlflowClient(tracking_uri=self._uri))

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Replaces the error of a server that cannot be reached, which MLflow reports in half a page."""
        try:
            yield
        except Exception as error:
            server = self._uri or self._mlflow.get_tracking_uri()
            if (reason := not_reached(error, server, float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))) is None:
                raise
            raise RuntimeError(reason) from error

    def _open(self, client: Any) -> None:
        found = client.get_experiment_by_name(self._experiment)
        experiment_id = found.experiment_id if found is not None else client.create_experiment(self._experiment)
        run = self._known_run(client, experiment_id)
        if run is None:
            run = client.create_run(experiment_id, run_name=self._run_name)
            if self._save is not None:
                write_id(self._save / "mlflow_run_id", run.info.run_id)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        self._log_parameters(client, run)
        self._client, self._run_id = client, run.info.run_id

    def _known_run(self, client: Any, experiment_id: str) -> Any:
        """Returns the run whose id is in the run's folder; None if there is none, or the server does not have it in the experiment."""
        run_id = read_id(self._save / "mlflow_run_id") if self._save is not None else None
        if run_id is None:
            return None
        try:
            run = client.get_run(run_id)
        except self._mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.experiment_id == experiment_id and run.info.lifecycle_stage == "active" else None

    def _log_parameters(self, client: Any, run: Any) -> None:
        """Logs the options as parameters. Those never change in MLflow: what a resumed run changes becomes a tag `changed.NAME`."""
        entities, known = self._mlflow.entities, run.data.params
        new = [entities.Param(key, value) for key, value in self._parameters.items() if key not in known]
        for first in range(0, len(new), _PARAMETERS_A_REQUEST):
            client.log_batch(run.info.run_id, params=new[first : first + _PARAMETERS_A_REQUEST])
        changed = {key: value for key, value in self._parameters.items() if known.get(key, value) != value}
        tags = [entities.RunTag(f"changed.{key}", value) for key, value in changed.items()]
        if tags:
            client.log_batch(run.info.run_id, tags=tags[:_PARAMETERS_A_REQUEST])

    def add(self, records: Sequence[Timed]) -> None:
        """Logs the values, all that wait in as few requests as possible."""
        metric = self._mlflow.entities.Metric
        values = [
            metric(_name(name), value, round(1000 * timed.time), timed.record.tokens)
            for timed in records
            for name, value in named_values(timed.record).items()
        ]
        with self._plain_errors():
            for first in range(0, len(values), _VALUES_A_REQUEST):
                self._client.log_batch(self._run_id, metrics=values[first : first + _VALUES_A_REQUEST])

    def abandon(self) -> None:
        """Forgets the client; it holds no connection."""
        self._client = None

    def close(self, end: RunEnd | None) -> None:
        """Sets the state of the run: finished, killed if it was asked to stop, failed after an error."""
        status = "FAILED" if end is None else "FINISHED" if end.code == ExitCode.DONE else "KILLED"
        with self._plain_errors():
            self._client.set_terminated(self._run_id, status)


def _name(name: str) -> str:
    """Returns a name that MLflow accepts: the same, except for unusual names of corpora."""
    return _NOT_IN_NAMES.sub("_", name)[:_LONGEST_NAME]


def _text(value: Any) -> str:
    """Returns the value of an option as MLflow's text, shortened to what it accepts."""
    return str(value)[:_LONGEST_VALUE]
