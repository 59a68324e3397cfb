"""The commit protocol of checkpoints: whole and verified, or invisible.

In: a folder SAVE/.partial-step-N-… that ranks have written their files into, each forced to disk and read back. Out: a manifest of sizes
and checksums, written last; the folder under its own name SAVE/step-N; SAVE/latest, replaced in one step; on the way back, the newest
checkpoint whose files are what its manifest says. A kill at any moment leaves either the checkpoint before or the new one; `latest` is a
hint for people and scripts, never trusted. Every attempt has a folder of its own, so that a rank that outlives its job writes into nothing
that a later attempt made.
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
from megatron_patch.utils.files import checksum, fsync_folder, make_folder, read_json, write_durably

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial-"
TRASH = ".trash-"
_NAME = re.compile(rf"(?P<partial>{re.escape(PARTIAL)})?step-(?P<step>[0-9]{{1,18}})(?(partial)-[0-9a-f]+)")
_WEIGHTS = "state-*.safetensors"


@dataclass(frozen=True)
class ManifestEntry:
    """A file in the manifest."""

    size: int
    xxh64: str


@dataclass(frozen=True)
class FoundCheckpoint:
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


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None where it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match["step"]) if match else None


def _is_partial(folder: Path) -> bool:
    return folder.name.startswith(PARTIAL)


def prepare(save: Path, step: int) -> Path:
    """Makes an empty folder for an attempt at a checkpoint; what killed attempts left is removed, what they finished gets its name.

    Only the owner of `save` may call it (see `checkpoints.lock`), and only while no other attempt is under way.
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
    """A killed attempt that was finished gets its name, unless a sound checkpoint has it; any other is removed."""
    target = attempt.with_name(folder_name(step_of(attempt) or 0))
    if verify(attempt) or (target.exists() and not verify(target)):
        _discard(attempt)
    else:
        _rename(attempt, target)


def _rename(attempt: Path, target: Path) -> None:
    """Gives an attempt its name. What has that name already goes only when the new one is there."""
    before = _set_aside(target) if target.exists() else None
    os.replace(attempt, target)
    fsync_folder(target.parent)
    if before is not None:
        _remove(before)


def write_state(folder: Path, state: TrainerState) -> dict[str, ManifestEntry]:
    """Writes the trainer state into a checkpoint and describes its file."""
    text = json.dumps(asdict(state), indent=1) + "\n"
    write_durably(folder / STATE, text)
    return {STATE: manifest_entry(text)}


def share_of_rank(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """This rank's share of a checkpoint's files, balanced by size, so that all ranks together read each file once.

    Args:
        sizes: of all files, by name.
        rank: this rank.
        ranks: how many share.
    """
    loads = [(0, other) for other in range(ranks)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name] + 1, least))
        if least == rank:
            mine.append(name)
    return mine


def manifest_entry(text: str) -> ManifestEntry:
    """What the manifest says of a file with this text."""
    data = text.encode()
    return ManifestEntry(len(data), xxhash.xxh64(data).hexdigest())


def write_manifest(folder: Path, entries: Mapping[str, ManifestEntry]) -> None:
    """Makes a checkpoint whole: its manifest, last of all."""
    fsync_folder(folder)
    body = {name: asdict(entry) for name, entry in sorted(entries.items())}
    digest = xxhash.xxh64(json.dumps(body).encode()).hexdigest()
    write_durably(folder / MANIFEST, json.dumps({"version": MANIFEST_VERSION, "files": body, "xxh64": digest}, indent=1) + "\n")


def publish(folder: Path) -> Path:
    """Gives a whole checkpoint its name and points `latest` at it.

    One of the same step that is there already (it was skipped as unsound, or is of another run) goes only now; a kill in between leaves
    the new one under its partial name, where it is found.

    Args:
        folder: as `prepare` named it, with its manifest.

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
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is torn, or it names a path outside the folder.
    """
    path = folder / MANIFEST
    try:
        data = read_json(path)
        body = data["files"]
        if data["version"] != MANIFEST_VERSION or xxhash.xxh64(json.dumps(body).encode()).hexdigest() != data["xxh64"]:
            raise ValueError("its own checksum does not fit")
        entries = {name: _entry(entry) for name, entry in body.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no manifest: it was not finished, or has lost it", "a finished checkpoint", "resume from another checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "a whole manifest", "resume from another checkpoint") from error
    for name in entries:
        if not _inside(folder, name):
            raise CheckpointError(f"{path} names {name!r}", "files inside the checkpoint's folder", "do not use this checkpoint")
    return entries


def _entry(value: Any) -> ManifestEntry:
    size, digest = value["size"], value["xxh64"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError("a size is no whole number, or a checksum no text")
    return ManifestEntry(size, digest)


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a file in the folder, neither written nor linked to one elsewhere."""
    if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def verify(folder: Path, share: Callable[[Mapping[str, ManifestEntry]], Iterable[str]] = list, full: bool = True) -> list[str]:
    """What is wrong with a checkpoint; an empty list where it is sound.

    Args:
        folder: the checkpoint.
        share: the files to look at, of those in the manifest, so that ranks can share the work.
        full: compare checksums, not sizes alone.
    """
    try:
        entries = read_manifest(folder)
    except CheckpointError as error:
        return [error.what]
    # A reader takes all files of weights that it finds; none may be there that nothing vouches for.
    problems = [f"{path.name} is not in the manifest" for path in sorted(folder.glob(_WEIGHTS)) if path.name not in entries]
    if STATE not in entries:
        problems.append(f"the manifest lacks {STATE}")
    for name in share(entries):
        path, entry = folder / name, entries[name]
        try:
            size = path.stat().st_size
            if size != entry.size:
                problems.append(f"{name} has {size} bytes of {entry.size}")
            elif full and checksum(path) != entry.xxh64:
                problems.append(f"{name} has another checksum than its manifest says")
        except OSError as error:
            problems.append(f"{name}: {error.strerror or error}")
    return problems


def read_state(folder: Path) -> TrainerState:
    """The trainer state of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / STATE
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "a whole checkpoint", "resume from another checkpoint") from error
    return TrainerState.from_json(data, str(path))


def checkpoints(save: Path) -> list[Path]:
    """All folders of checkpoints, newest first, sound or not; those that a kill kept from their name are among them once they are whole."""
    if not save.is_dir():
        return []
    steps = {path: step for path in save.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    found = [path for path in steps if not _is_partial(path) or (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: (steps[path], not _is_partial(path), path.name), reverse=True)


def find_newest_valid(
    save: Path, wanted: Callable[[TrainerState], bool] | None = None, check: Callable[[Path], list[str]] = verify
) -> FoundCheckpoint | None:
    """The newest checkpoint that verifies, or None where there are no checkpoints.

    `save` may also be one checkpoint's own folder.

    Args:
        save: of the run.
        wanted: looks at no others; one whose state cannot be read is none of them. None: at all.
        check: tells what is wrong with one, as `verify` does.

    Raises:
        CheckpointError: there are checkpoints, but none is sound, or the folder cannot be read.
    """
    try:
        candidates = [save] if (save / MANIFEST).is_file() else checkpoints(save)
    except OSError as error:
        raise CheckpointError(f"cannot read {save}: {error.strerror}", "a folder that this user can read", "check the path") from error
    skipped: list[tuple[str, str]] = []
    for folder in candidates:
        try:
            if wanted is not None and not wanted(read_state(folder)):
                continue
        except CheckpointError:
            continue
        # Sizes first: what is missing or cut is known without reading the rest.
        problems = verify(folder, full=False) or check(folder)
        if not problems:
            try:
                return FoundCheckpoint(folder, read_state(folder), tuple(skipped))
            except CheckpointError as error:
                problems = [error.what]
        skipped.append((str(folder), "; ".join(problems)))
    if skipped:
        raise CheckpointError(
            "no sound checkpoint: " + "; ".join(f"{folder}: {reason}" for folder, reason in skipped),
            "at least one whole checkpoint",
            "restore one from a copy, or start again with another --save",
        )
    return None


def _set_aside(folder: Path) -> Path:
    """Renames a checkpoint, so that a kill never leaves half of one under its name."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    os.replace(folder, trash)
    return trash


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path) -> None:
    _remove(_set_aside(folder))


def discard(folder: Path) -> bool:
    """Removes a checkpoint, or an attempt at one; whether that succeeded."""
    with contextlib.suppress(OSError):
        _discard(folder)
        return True
    return False
