"""What a checkpoint records of the training run: where it stands, and what it must agree with to resume.

In: the trainer's progress, plan, options and data. Out: `trainer_state.json`, and the same record back with every field checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron_patch.credentials import cleaned_record
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.records import record_from_json, whole_number

STATE = "trainer_state.json"
STATE_VERSION = 2
_WITH_ADDRESSES = ("plan", "config", "data_fingerprint", "begun_from", "held_out")
_COUNTS = ("step", "stage_index", "stage_step", "consumed_tokens", "consumed_samples")


@dataclass(frozen=True)
class HeldOutName:
    """The name under which the metrics of a run have the held-out loss of a corpus.

    Args:
        name: the name.
        path: `real_path` of the corpus, as the run last read it.
        tokens: number of its tokens; None if unknown.
    """

    name: str
    path: str
    tokens: int | None = None


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, and what it must agree with to resume.

    Args:
        step: optimizer steps taken since the start of the run.
        stage_index: number of the current stage, from 0.
        stage_step: optimizer steps taken in that stage.
        stage_name: name of that stage.
        consumed_tokens: input tokens read since the start of the run.
        consumed_samples: samples read in that stage.
        plan: the stage plan, as `StagePlan.to_json` gives it.
        config: all options, and the origin of each one that was given.
        data_fingerprint: fingerprint of the corpora and of the order in which they are read.
        engine: what the engine needs to load its own state (see `Snapshot.state`).
        model: the fields of the model's `ModelShape`.
        stage_end: whether the stage ends at this step.
        guard: the state of the step guard (`StepGuard.state`); None for weights without a run.
        begun_from: absolute path of the --load folder that the run began with, or None.
        data_metadata: metadata of the first training corpus, whose tokenizer evaluation and export use; None if unknown.
        weights_only: whether there are weights, but no run to resume.
        imported_from: path that converted weights came from, or None.
        special_ids: `bos_token_id` and `eos_token_id` of converted weights, or None.
        kept_config: keys of the imported config.json that an export writes again (`kept_keys`); empty without an import.
        held_out: the corpora that the run has evaluated so far; empty in checkpoints of earlier versions.
        own_model: name of the user's function that builds the model; None: the program's own model.
        version: version of this record's format.
    """

    step: int
    stage_index: int
    stage_step: int
    stage_name: str
    consumed_tokens: int
    consumed_samples: int
    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    data_fingerprint: Mapping[str, Any]
    engine: Mapping[str, Any]
    model: Mapping[str, Any]
    stage_end: bool = False
    guard: Mapping[str, Any] | None = None
    begun_from: str | None = None
    data_metadata: Mapping[str, Any] | None = None
    weights_only: bool = False
    imported_from: str | None = None
    special_ids: Mapping[str, Any] | None = None
    kept_config: Mapping[str, Any] = field(default_factory=dict)
    held_out: tuple[HeldOutName, ...] = ()
    own_model: str | None = None
    version: int = STATE_VERSION

    @staticmethod
    def from_json(data: Any, where: str) -> TrainerState:
        """Returns the record that the JSON values describe.

        Args:
            data: the parsed file, of this version or of version 1.
            where: its path, for messages.

        Raises:
            CheckpointError: the version is unknown, or a field is missing or has the wrong type.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version not in (1, STATE_VERSION) or isinstance(version, bool):
            raise CheckpointError(f"{where} is not a trainer state of version 1 or {STATE_VERSION}", "a checkpoint of this program")
        if version == 1:
            data = _from_version_1(data, where)
        # Fields that were added without another version.
        data = {"held_out": (), "own_model": None, "kept_config": {}, **data}
        # Not the metadata: the pattern of a tokenizer may look like an address, and must stay as it is.
        data = {name: cleaned_record(value) if name in _WITH_ADDRESSES else value for name, value in data.items()}
        names = [f.name for f in fields(TrainerState)]
        missing = [name for name in names if name not in data]
        if missing:
            raise CheckpointError(f"{where} lacks {missing[0]!r}", "a complete trainer state")
        try:
            state = record_from_json(TrainerState, {name: data[name] for name in names})
            for name in _COUNTS:
                whole_number(getattr(state, name), 0)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}", "a complete trainer state, as this program writes it") from error
        return state


def _from_version_1(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Version 1 kept the fields with defaults in a mapping named "extra", and the data's metadata under the name "data_info"."""
    extra = data.get("extra")
    if not isinstance(extra, dict):
        raise CheckpointError(f"{where}: extra is {extra!r}"[:300], "a dict")
    added = {f.name: f.default for f in fields(TrainerState) if f.default is not MISSING}
    values = {name: extra.get(name, default) for name, default in added.items()}
    return {**data, **values, "data_metadata": extra.get("data_info"), "version": STATE_VERSION}
