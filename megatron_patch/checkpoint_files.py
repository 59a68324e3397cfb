"""The commit protocol of checkpoints: whole and verified, or invisible.

In: a folder SAVE/step-N that ranks have written their files into. Out: a manifest of sizes and checksums, written last; SAVE/latest,
replaced in one step; on the way back, the newest checkpoint whose files are what its manifest says. A kill at any moment leaves either
the checkpoint before or the new one; `latest` is a hint for people and scripts, never trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from megatron_patch.errors import CheckpointError
from megatron_patch.files import checksum, fsync_folder, write_durably

VERSION = 1
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
_TRASH = ".trash-"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, and what it must agree with to go on.

    Args:
        step: optimizer steps of the whole run.
        stage_index: the stage it is in.
        stage_step: steps of that stage.
        stage_name: its name.
        consumed_tokens: input tokens of the whole run.
        consumed_samples: samples of the stage.
        plan: the stage plan.
        config: all options and their origins.
        data_fingerprint: of the corpora and their order.
        engine: what the engine needs to load itself.
        model: the model's shape.
        extra: anything else.
        version: of this record.
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
    extra: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @staticmethod
    def from_json(data: Any, where: str) -> TrainerState:
        """Reads a record.

        Raises:
            CheckpointError: a field is missing or of another kind, or the version is unknown.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise CheckpointError(f"{where} is no trainer state of version {VERSION}", "a checkpoint of this program")
        values: dict[str, Any] = {}
        for f in fields(TrainerState):
            if f.name not in data:
                raise CheckpointError(f"{where} lacks {f.name!r}", "a whole trainer state")
            value = data[f.name]
            number = f.type == "int"
            kind: type = int if number else str if f.type == "str" else dict
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
                raise CheckpointError(f"{where}: {f.name} is {value!r}", f"a {kind.__name__}")
            values[f.name] = value
        return TrainerState(**values)


@dataclass(frozen=True)
class Entry:
    """A file in the manifest."""

    size: int
    xxh64: str


@dataclass(frozen=True)
class Found:
    """A sound checkpoint.

    Args:
        folder: where it is.
        state: its trainer state.
        skipped: (folder, reason) of newer ones that are not sound.
    """

    folder: Path
    state: TrainerState
    skipped: tuple[tuple[str, str], ...] = ()


def folder_name(step: int) -> str:
    """step-00001234."""
    return f"step-{step:08d}"


def prepare(save: Path, step: int) -> Path:
    """Makes an empty folder for a checkpoint; what a killed attempt left there is removed."""
    folder = save / folder_name(step)
    if folder.exists():
        _discard(folder)
    folder.mkdir(parents=True)
    return folder


def write_state(folder: Path, state: TrainerState) -> None:
    """Writes the trainer state into a checkpoint."""
    write_durably(folder / STATE, json.dumps(asdict(state), indent=1) + "\n")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def files_of_rank(folder: Path, rank: int, ranks: int) -> list[str]:
    """This rank's share of a checkpoint's files, balanced by size, so that all ranks together checksum each file once."""
    loads = [0] * ranks
    mine = []
    sizes = {name: (folder / name).stat().st_size for name in _files(folder)}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == rank:
            mine.append(name)
    return mine


def entries_of_rank(folder: Path, rank: int, ranks: int) -> dict[str, Entry]:
    """Forces this rank's share of the files to disk and describes them."""
    entries = {}
    for name in files_of_rank(folder, rank, ranks):
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[name] = Entry(path.stat().st_size, checksum(path))
    return entries


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Makes a checkpoint whole: its manifest, last of all."""
    fsync_folder(folder)
    body = {name: asdict(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"version": VERSION, "files": body}, indent=1)
    digest = xxhash.xxh64(json.dumps(body).encode()).hexdigest()
    write_durably(folder / MANIFEST, json.dumps({**json.loads(text), "xxh64": digest}, indent=1) + "\n")


def publish(save: Path, step: int) -> None:
    """Points SAVE/latest at a checkpoint."""
    write_durably(save / "latest", folder_name(step) + "\n")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is torn, or it names a path outside the folder.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        body = data["files"]
        if data["version"] != VERSION or xxhash.xxh64(json.dumps(body).encode()).hexdigest() != data["xxh64"]:
            raise ValueError("its own checksum does not fit")
        entries = {str(name): Entry(int(entry["size"]), str(entry["xxh64"])) for name, entry in body.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no manifest: it was not finished", "a finished checkpoint") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "a whole manifest") from error
    for name in entries:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name!r}", "files inside the checkpoint's folder", "do not use this checkpoint")
    return entries


def verify(folder: Path, names: Iterable[str] | None = None, full: bool = True) -> list[str]:
    """What is wrong with a checkpoint; an empty list where it is sound.

    Args:
        folder: the checkpoint.
        names: the files to look at, so that ranks can share the work; None: all.
        full: compare checksums, not sizes alone.
    """
    try:
        entries = read_manifest(folder)
    except CheckpointError as error:
        return [error.what]
    problems = []
    for name in entries if names is None else names:
        path, entry = folder / name, entries[name]
        try:
            size = path.stat().st_size
            if size != entry.size:
                problems.append(f"{name} has {size} bytes of {entry.size}")
            elif full and checksum(path) != entry.xxh64:
                problems.append(f"{name} has another checksum than its manifest says")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def read_state(folder: Path) -> TrainerState:
    """The trainer state of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / STATE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "a whole checkpoint") from error
    return TrainerState.from_json(data, str(path))


def checkpoints(save: Path) -> list[Path]:
    """All folders of checkpoints, newest first, sound or not."""
    if not save.is_dir():
        return []
    found = [path for path in save.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find_newest_sound(save: Path) -> Found | None:
    """The newest checkpoint that verifies, or None where there are no checkpoints.

    `save` may also be one checkpoint's own folder.

    Raises:
        CheckpointError: there are checkpoints, but none is sound.
    """
    candidates = [save] if (save / MANIFEST).is_file() else checkpoints(save)
    skipped: list[tuple[str, str]] = []
    for folder in candidates:
        problems = verify(folder)
        if not problems:
            try:
                return Found(folder, read_state(folder), tuple(skipped))
            except CheckpointError as error:
                problems = [error.what]
        skipped.append((str(folder), "; ".join(problems)))
    finished = [entry for entry in skipped if (Path(entry[0]) / MANIFEST).exists()]
    if finished:
        raise CheckpointError(
            "no sound checkpoint: " + "; ".join(f"{folder}: {reason}" for folder, reason in skipped),
            "at least one whole checkpoint",
            "restore one from a copy, or start again with another --save",
        )
    return None


def _discard(folder: Path) -> None:
    """Removes a checkpoint; it is renamed first, so that a kill never leaves half of one under its name."""
    trash = folder.with_name(_TRASH + folder.name)
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(save: Path, keep_last: int, keep: Iterable[int] = ()) -> list[Path]:
    """Removes old checkpoints once the newest is known to be whole.

    Args:
        save: the run's folder.
        keep_last: how many to keep; 0: all.
        keep: steps to keep whatever their age.

    Returns:
        The folders that were removed.
    """
    for trash in save.glob(f"{_TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)
    all_checkpoints = checkpoints(save)
    if keep_last <= 0 or not all_checkpoints or verify(all_checkpoints[0], full=False):
        return []
    wanted = {folder_name(step) for step in keep}
    finished = [folder for folder in all_checkpoints if (folder / MANIFEST).exists() and folder.name not in wanted]
    removed = []
    for folder in finished[keep_last:]:
        with contextlib.suppress(OSError):
            _discard(folder)
            removed.append(folder)
    return removed
