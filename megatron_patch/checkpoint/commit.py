"""The commit protocol of checkpoints: a checkpoint counts as complete once its manifest is written, after all files are verified.

Writing: the ranks write their files into a folder SAVE/.partial-step-N-…, force each file to disk and read it back. Then a manifest of
sizes and checksums is written, the folder is renamed to SAVE/step-N, and SAVE/latest is replaced atomically. A kill at any moment leaves
either the previous checkpoint or the new one. Each attempt has its own folder, so that a rank that outlives its job cannot write into the
folder of a later attempt.

Reading: the newest checkpoint whose files match its manifest. `latest` is a hint for people and scripts; this program does not trust it.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_patch.checkpoint.trainer_state import STATE, TrainerState
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import checksum, fsync_folder, make_folder, read_json, reason, write_durably

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial-"
TRASH = ".trash-"
_NAME = re.compile(rf"(?P<partial>{re.escape(PARTIAL)})?step-(?P<step>[0-9]{{1,18}})(?(partial)-[0-9a-f]+)")
_WEIGHTS = "state-*.safetensors"


@dataclass(frozen=True)
class ManifestEntry:
    """Size and checksum of a file, as the manifest records them.

    Args:
        size: size in bytes.
        xxh64: checksum of the content, in hexadecimal digits.
    """

    size: int
    xxh64: str


@dataclass(frozen=True)
class ValidCheckpoint:
    """A valid checkpoint.

    Args:
        folder: its folder.
        state: its trainer state.
        skipped: (folder, reason) of each newer checkpoint that is not valid.
    """

    folder: Path
    state: TrainerState
    skipped: tuple[tuple[str, str], ...] = ()


def folder_name(step: int) -> str:
    """Returns the name of a checkpoint's folder: 1234 -> "step-00001234"."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Returns the step in the name of a checkpoint's folder, complete or partial; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match["step"]) if match else None


def _is_partial(folder: Path) -> bool:
    return folder.name.startswith(PARTIAL)


def prepare(save: Path, step: int) -> Path:
    """Creates an empty folder for a new checkpoint and cleans up after killed attempts.

    A killed attempt that is complete is renamed to its checkpoint's name; an incomplete one is removed. Only the job that holds the
    `SaveLock` of `save` may call this function, and only while it writes no other checkpoint.
    """
    make_folder(save)
    for attempt in [path for path in save.iterdir() if _is_partial(path) and step_of(path) is not None]:
        _settle(attempt)
    for trash in save.glob(f"{TRASH}*"):
        _remove(trash)
    folder = save / f"{PARTIAL}{folder_name(step)}-{secrets.token_hex(4)}"
    make_folder(folder)
    return folder


def _settle(attempt: Path) -> None:
    """Renames a killed attempt to its checkpoint's name if it is complete and no valid checkpoint has that name; else removes it."""
    target = attempt.with_name(folder_name(step_of(attempt) or 0))
    if verify(attempt) or (target.exists() and not verify(target)):
        _discard(attempt)
    else:
        _rename(attempt, target)


def _rename(attempt: Path, target: Path) -> None:
    """Renames an attempt to `target`. An existing folder of that name is removed after the rename, not before."""
    previous = _set_aside(target) if target.exists() else None
    os.replace(attempt, target)
    fsync_folder(target.parent)
    if previous is not None:
        _remove(previous)


def write_state(folder: Path, state: TrainerState) -> dict[str, ManifestEntry]:
    """Writes the trainer state into a checkpoint's folder and returns the manifest entry of its file."""
    text = json.dumps(asdict(state), indent=1) + "\n"
    write_durably(folder / STATE, text)
    return {STATE: manifest_entry(text)}


def share_of_rank(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """Returns the files of a checkpoint that this rank reads; the ranks together read each file once, with balanced sizes.

    Args:
        sizes: name -> size in bytes of each file.
        rank: this rank.
        ranks: number of ranks that share the files.
    """
    loads = [(0, other) for other in range(ranks)]
    selected = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name] + 1, least))
        if least == rank:
            selected.append(name)
    return selected


def manifest_entry(text: str) -> ManifestEntry:
    """Returns the manifest entry of a file with this content."""
    data = text.encode()
    return ManifestEntry(len(data), xxhash.xxh64(data).hexdigest())


def write_manifest(folder: Path, entries: Mapping[str, ManifestEntry]) -> None:
    """Writes the manifest, which completes a checkpoint: it must be written after all other files."""
    fsync_folder(folder)
    body = {name: asdict(entry) for name, entry in sorted(entries.items())}
    own_checksum = xxhash.xxh64(json.dumps(body).encode()).hexdigest()
    write_durably(folder / MANIFEST, json.dumps({"version": MANIFEST_VERSION, "files": body, "xxh64": own_checksum}, indent=1) + "\n")


def publish(folder: Path) -> Path:
    """Renames a complete checkpoint to its final name and writes that name to `latest`.

    A checkpoint of the same step that exists already (a damaged one, or one of another branch) is removed only now. A kill in between
    leaves the new one under its partial name, where `list_checkpoints` finds it.

    Args:
        folder: the folder that `prepare` returned, with its manifest.

    Returns:
        The checkpoint's folder.
    """
    step, save = step_of(folder), folder.parent
    assert step is not None
    target = save / folder_name(step)
    if _is_partial(folder):
        _rename(folder, target)
    write_durably(save / "latest", target.name + "\n")
    return target


def read_manifest(folder: Path) -> dict[str, ManifestEntry]:
    """Returns the manifest of a checkpoint: file name -> entry.

    Raises:
        CheckpointError: the manifest is missing or damaged, or names a path outside of the folder.
    """
    path = folder / MANIFEST
    try:
        data = read_json(path)
        body = data["files"]
        if data["version"] != MANIFEST_VERSION or xxhash.xxh64(json.dumps(body).encode()).hexdigest() != data["xxh64"]:
            raise ValueError("its version is unknown, or its content does not match its own checksum")
        entries = {name: _entry(entry) for name, entry in body.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: the checkpoint is incomplete", "a complete checkpoint", "resume from another checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}", "a complete manifest", "resume from another checkpoint") from error
    for name in entries:
        if not _inside(folder, name):
            raise CheckpointError(
                f"{path} names the file {name!r}", "files inside of the checkpoint's folder", "do not use this checkpoint"
            )
    return entries


def _entry(value: Any) -> ManifestEntry:
    size, xxh64 = value["size"], value["xxh64"]
    if type(size) is not int or size < 0 or not isinstance(xxh64, str):
        raise ValueError("a size is not a whole number, or a checksum is not a string")
    return ManifestEntry(size, xxh64)


def _inside(folder: Path, name: str) -> bool:
    """Returns whether a name stays inside of the folder, also after symbolic links are followed."""
    if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def verify(folder: Path, share: Callable[[Mapping[str, ManifestEntry]], Iterable[str]] = list, full: bool = True) -> list[str]:
    """Returns the problems of a checkpoint; an empty list means that it is valid.

    Args:
        folder: the checkpoint.
        share: selects the files to check from those in the manifest, so that ranks can share the work.
        full: compare checksums, which reads all data; else only sizes.
    """
    try:
        entries = read_manifest(folder)
    except CheckpointError as error:
        return [error.what]
    # Loading reads every file of weights in the folder, so none may lack a checksum in the manifest.
    problems = [f"{path.name} is not in the manifest" for path in sorted(folder.glob(_WEIGHTS)) if path.name not in entries]
    if STATE not in entries:
        problems.append(f"{STATE} is not in the manifest")
    for name in share(entries):
        path, entry = folder / name, entries[name]
        try:
            size = path.stat().st_size
            if size != entry.size:
                problems.append(f"{name} has {size:,} bytes instead of {entry.size:,}")
            elif full and checksum(path) != entry.xxh64:
                problems.append(f"{name} does not match its checksum in the manifest")
        except OSError as error:
            problems.append(f"{name}: {error.strerror or error}")
    return problems


def read_state(folder: Path) -> TrainerState:
    """Returns the trainer state of a checkpoint.

    Raises:
        CheckpointError: the state is missing or damaged.
    """
    path = folder / STATE
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}", "a complete checkpoint", "resume from another checkpoint") from error
    return TrainerState.from_json(data, str(path))


def list_checkpoints(save: Path) -> list[Path]:
    """Returns all folders of checkpoints, newest first, valid or not.

    They include complete checkpoints that still have their partial name because a kill prevented the rename.
    """
    if not save.is_dir():
        return []
    steps = {path: step for path in save.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    complete = [path for path in steps if not _is_partial(path) or (path / MANIFEST).is_file()]
    return sorted(complete, key=lambda path: (steps[path], not _is_partial(path), path.name), reverse=True)


def find_newest_valid(
    save: Path,
    wanted: Callable[[TrainerState], bool] | None = None,
    check: Callable[[Path], list[str]] = verify,
    check_state: Callable[[TrainerState], list[str]] = lambda state: [],
) -> ValidCheckpoint | None:
    """Returns the newest valid checkpoint, or None if there are no checkpoints.

    Args:
        save: a run's folder, or the folder of one checkpoint.
        wanted: selects checkpoints by their trainer state; others, and those whose state cannot be read, are ignored. None: all.
        check: returns the problems of a checkpoint, as `verify` does.
        check_state: returns the problems of a trainer state.

    Raises:
        CheckpointError: there are checkpoints but none is valid, or the folder cannot be read.
    """
    try:
        candidates = [save] if (save / MANIFEST).is_file() else list_checkpoints(save)
    except OSError as error:
        raise CheckpointError(f"cannot read {save}: {error.strerror}", "a folder that this user can read", "check the path") from error
    skipped: list[tuple[str, str]] = []
    for folder in candidates:
        try:
            if wanted is not None and not wanted(read_state(folder)):
                continue
        except CheckpointError:
            continue
        # Sizes first: missing and truncated files are found without reading any data.
        problems = verify(folder, full=False) or check(folder)
        if not problems:
            try:
                state = read_state(folder)
                if not (problems := check_state(state)):
                    return ValidCheckpoint(folder, state, tuple(skipped))
            except CheckpointError as error:
                problems = [error.what]
        skipped.append((str(folder), "; ".join(problems)))
    if skipped:
        raise CheckpointError(
            "no valid checkpoint: " + "; ".join(f"{folder}: {reason}" for folder, reason in skipped),
            "at least one valid checkpoint",
            "restore one from a copy, or start a new run with another --save",
        )
    return None


def _set_aside(folder: Path) -> Path:
    """Renames a checkpoint before it is removed, so that a kill never leaves an incomplete one under its name."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    os.replace(folder, trash)
    return trash


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path) -> None:
    _remove(_set_aside(folder))


def discard(folder: Path) -> bool:
    """Removes a checkpoint's folder, complete or partial, and returns whether that succeeded."""
    with contextlib.suppress(OSError):
        _discard(folder)
        return True
    return False
