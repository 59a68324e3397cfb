"""Finished runs as small records that are kept in a repository, so that a clone continues a study without the folders of its runs.

In: a study's settings and its outcomes. Out: a JSON Lines file and back. The first line describes the study: its configuration, budget,
text and number of parameters. Each further line is one run: arm, seed, options, results, thinned curves, and where and when it was trained.
A record stands for its run only while everything that decides the run's losses agrees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.replication.results import Outcome
from megatron_patch.utils.files import reason, write_durably
from megatron_patch.utils.records import record_from_json


@dataclass(frozen=True)
class StudyText:
    """The tokenized text of a study.

    Args:
        documents: number of documents.
        tokens: number of tokens.
        vocab_size: of the tokenizer.
        checksum: xxh64 of the tokens' file.
    """

    documents: int
    tokens: int
    vocab_size: int
    checksum: str


@dataclass(frozen=True)
class StudyHeader:
    """What all runs of a study share.

    Args:
        config: options of the configuration file.
        budget: cost tokens per arm.
        vocab_size: wanted size of the vocabulary.
        parameters: number of parameters of the model.
        text: the text.
    """

    config: Mapping[str, Any]
    budget: int
    vocab_size: int
    parameters: int
    text: StudyText


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Args:
        outcome: its results.
        options: options of its arm, by flag.
        commit: of the program that trained it, as `read_origin` words it.
        machine: the devices that trained it, in words.
        date: on which it ended, as YYYY-MM-DD.
    """

    outcome: Outcome
    options: Mapping[str, str]
    commit: str
    machine: str
    date: str

    @property
    def run(self) -> tuple[str, int]:
        """Arm and seed."""
        return self.outcome.arm, self.outcome.seed


def read_records(path: Path) -> tuple[StudyHeader, list[RunRecord]]:
    """Reads the records of a study.

    Raises:
        DataError: the file cannot be read, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason(error)}", "the records of a study", "check the path") from error
    records: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            records.append(record_from_json(StudyHeader, data) if number == 1 else _run_from_json(data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: {type(error).__name__}: {error}"[:300],
                "a first line with the study, and a line per run, as study.py --records writes them",
                "restore the file from the repository",
            ) from error
    if not records:
        raise DataError(f"{path} is empty", "the records of a study", "remove the file, or restore it from the repository")
    return records[0], records[1:]


def write_records(path: Path, header: StudyHeader, records: Sequence[RunRecord]) -> None:
    """Writes the records of a study, a line each."""
    lines = [asdict(header), *map(_run_to_json, records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def check_same_study(path: Path, recorded: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Checks that records belong to this study.

    Args:
        path: file of the records.
        recorded: settings in the file: nested mappings of values.
        mine: the same settings of this study; settings that it lacks are not compared.

    Raises:
        ConfigError: some differ; the error names each with both values.
    """
    theirs, ours = _flat({key: recorded[key] for key in mine}), _flat(mine)
    names = sorted(theirs.keys() | ours.keys())
    changed = [name for name in names if theirs.get(name) != ours.get(name)]
    if changed:
        shown = "; ".join(
            f"{name} is {ours.get(name, 'not set')} here and {theirs.get(name, 'not set')} in the records" for name in changed
        )
        raise ConfigError(
            f"{path} holds the records of another study: {shown}",
            "records of runs with the same settings",
            "repeat the settings of the records, or name another file with --records",
        )


def check_same_arm(path: Path, record: RunRecord, options: Mapping[str, str]) -> None:
    """Checks that a record's run had the options that its arm has now.

    Raises:
        ConfigError: some differ; the error names each with both values.
    """
    arm, seed = record.run
    names = sorted(options.keys() | record.options.keys())
    changed = [name for name in names if options.get(name) != record.options.get(name)]
    if changed:
        shown = "; ".join(
            f"{name} is {options.get(name, 'not set')} now and was {record.options.get(name, 'not set')} then" for name in changed
        )
        raise ConfigError(
            f"{path}: the record of arm {arm}, seed {seed}, has other options: {shown}",
            "records of runs with the options of their arm",
            "restore the arm's options (those of an optimizer are in the configuration, under study), or name another file with --records",
        )


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted names and values as JSON would keep them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{before}{name}.")
        else:
            result[before + name] = json.loads(json.dumps(value, default=str))
    return result


def _run_to_json(record: RunRecord) -> dict[str, Any]:
    """Returns a record as JSON: losses with 5 decimals; training losses with 4, as one list over consecutive bins of cost."""
    outcome = asdict(record.outcome)
    bins = dict(record.outcome.training)
    first, last = (min(bins), max(bins)) if bins else (0, -1)
    losses = [round(bins[number], 4) if number in bins else None for number in range(first, last + 1)]
    outcome["curve"] = [[round(cost), round(loss, 5)] for cost, loss in record.outcome.curve]
    outcome["training"] = {"first": first, "losses": losses}
    if record.outcome.switch is not None:
        outcome["switch"] = {name: value if value is None else round(value, 5) for name, value in outcome["switch"].items()}
    if record.outcome.routing is None:
        del outcome["routing"]
    outcome["seconds"], outcome["loss"] = round(record.outcome.seconds, 1), round(record.outcome.loss, 5)
    return {**outcome, "options": dict(record.options), "commit": record.commit, "machine": record.machine, "date": record.date}


def _run_from_json(data: Mapping[str, Any]) -> RunRecord:
    """Returns the record of a line.

    Raises:
        ValueError, KeyError, TypeError: it is not the line of a run.
    """
    fields = dict(data)
    own = {name: fields.pop(name) for name in ("options", "commit", "machine", "date")}
    training = fields.pop("training")
    losses = [(training["first"] + number, loss) for number, loss in enumerate(training["losses"]) if loss is not None]
    outcome = record_from_json(Outcome, {**fields, "training": losses})
    return record_from_json(RunRecord, {**own, "outcome": asdict(outcome)})
