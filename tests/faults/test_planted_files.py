"""Somebody who may write to a run's folder, or to /tmp, puts links, pipes and folders where the program will write.

The program writes to no other file than its own, takes no code from there, and leaves nothing that everybody may change.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.checkpoint.safetensors_io import write_safetensors
from megatron_patch.convert.to_hugging_face import _resume
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.preprocess.progress_log import progress_log_path
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.stages import Progress
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.training.compile_cache import require_own_compile_cache
from megatron_patch.training.faults.exit_protocol import write_stacks
from megatron_patch.training.rollback import roll_back
from megatron_patch.utils.files import append_line, open_descriptor, open_in_place, open_new, read_json, write_durably
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command, make_corpus, start_program
from tests.faults.conftest import PLAN

SECRET = "precious\n"


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere that the user may write; it must stay as it is."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET and sorted(found.name for found in path.parent.iterdir()) == ["victim"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def tensors(path: Path) -> None:
    write_safetensors(path, [("a", (2,))], torch.float32, [torch.ones(2)], {})


def dataset(path: Path) -> None:
    with IndexedDatasetWriter(str(path.with_suffix("")), np.dtype(np.uint16)) as writer:
        writer.append(np.arange(3, dtype=np.uint16), np.array([3]))
        writer.finish()


# What is written, the name of the file that the content first goes to, and how.
REPLACED = {
    "latest, states, manifests, reports": ("x.json.partial", lambda folder: write_durably(folder / "x.json", "{}")),
    "metrics of a resumed run": ("metrics.jsonl.partial", lambda folder: roll_back(folder, 3, Progress(0, 3))),
    "tensors": ("state.safetensors", lambda folder: tensors(folder / "state.safetensors")),
    "stacks": ("stacks/rank-00000.txt", lambda folder: write_stacks(folder, 0, "stacks")),
    "tokens": ("d.bin.partial", lambda folder: dataset(folder / "d.bin")),
    "index": ("d.idx.partial", lambda folder: dataset(folder / "d.bin")),
    "lengths": ("d.lengths.partial", lambda folder: dataset(folder / "d.bin")),
    "tokenizer": ("t/tokenizer.json.partial", lambda folder: train_tokenizer([str(folder / "a.jsonl")], str(folder / "t"), 300)),
    "its settings": ("t/tokenizer_config.json", lambda folder: train_tokenizer([str(folder / "a.jsonl")], str(folder / "t"), 300)),
}


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("kind", REPLACED)
def test_a_link_at_the_name_of_a_temporary_file_is_replaced(folder, victim, kind, dangling):
    name, write = REPLACED[kind]
    (folder / "metrics.jsonl").write_text('{"type": "step", "step": 1}\n')
    (folder / "a.jsonl").write_text('{"text": "some text"}\n' * 9)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(victim.with_name("made") if dangling else victim)
    write(folder)
    assert not (folder / name).is_symlink()


APPENDED = {
    "metrics, events, samples, spans": lambda path: JsonlWriter(path).add({"step": 1}),
    "the last line of a failed run": lambda path: append_line(path, "x"),
    "progress of preprocessing": lambda path: open_in_place(path, "a").close(),
    "tokens, by workers": lambda path: os.close(open_descriptor(path, os.O_WRONLY)),
    "tokens, resumed": lambda path: open_in_place(path, "rb+").close(),
}


@pytest.mark.parametrize("planted", ["link", "pipe", "device"])
@pytest.mark.parametrize("kind", APPENDED)
def test_a_link_a_pipe_or_a_device_in_place_of_a_file_is_not_written_to(folder, victim, kind, planted, capsys):
    path = folder / "file.jsonl"
    if planted == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if planted == "link" else "/dev/zero")
    if kind.startswith("metrics"):
        # Training goes on without them, and says so.
        APPENDED[kind](path)
        assert "cannot write" in capsys.readouterr().err
    else:
        with pytest.raises(OSError):
            APPENDED[kind](path)


def test_a_pipe_in_place_of_json_is_not_waited_for(folder):
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(OSError, match="it is not a file"):
        read_json(folder / "manifest.json")


def test_new_files_are_made_only_by_this_program(folder, monkeypatch):
    """A link that appears between the removal of the old file and the opening of the new one is an error."""
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: path.symlink_to(folder / "made"))
    with pytest.raises(FileExistsError):
        open_new(folder / "x")
    assert not (folder / "made").exists()


def test_an_export_does_not_work_in_a_folder_elsewhere(folder, victim):
    (folder / "out.partial").symlink_to(victim.parent)
    with pytest.raises(CheckpointError, match="is not an unfinished export"):
        _resume(folder / "out.partial", {})


def test_progress_logs_lists_and_datasets_keep_their_names_after_a_run(tmp_path):
    """The tests above know these names."""
    assert progress_log_path("p").name == "p_progress.jsonl"
    writer = IndexedDatasetWriter(str(tmp_path / "d"), np.dtype(np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin.partial", "d.lengths.partial"]
    writer.close()


def run_with_umask(words: list[str], mask: int) -> int:
    before = os.umask(mask)
    try:
        return start_program(words)
    finally:
        os.umask(before)


def test_no_file_of_a_run_can_be_changed_by_everybody(tmp_path):
    """With umask 000, as some containers have it; what a group may do is left to the user's umask."""
    corpus = make_corpus(tmp_path / "walks")
    save = tmp_path / "run"
    flags = ["--data-path", corpus, "--save", str(save), "--exit-interval", "4", "--log-token-spans"]
    words = command(MODEL, DATA, PLAN, flags)
    assert run_ranks(run_with_umask, 1, tmp_path / "logs", words, 0) == [0]
    found = [save, *save.rglob("*")]
    assert len(found) > 10
    assert not [path for path in found if path.lstat().st_mode & stat.S_IWOTH]
    assert save.stat().st_mode & stat.S_IWGRP


def test_tools_leave_no_file_that_everybody_can_change(tmp_path, monkeypatch):
    from megatron_patch.cli.command_line import run_tool

    before = os.umask(0)
    try:
        assert run_tool(lambda argv: (tmp_path / "x").write_text("x") and None) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o664


def test_compiled_code_comes_from_a_folder_of_this_user(tmp_path, monkeypatch):
    from torch._inductor.runtime import cache_dir_utils

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "torchinductor_user"
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(folder))
    require_own_compile_cache()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    require_own_compile_cache()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others can put files into .*\n.*\n.*TORCHINDUCTOR_CACHE_DIR"):
        require_own_compile_cache()
    folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(ConfigError, match="others can put files into"):
            require_own_compile_cache()
        os.chown(folder, 0, 0)
    folder.rmdir()
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="others can put files into"):
        require_own_compile_cache()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    require_own_compile_cache()


def test_the_id_of_a_wandb_run_is_an_id(folder, victim, monkeypatch):
    """It becomes part of addresses and paths, so other text in the file is replaced by a new id, and a link is not written to."""
    from types import SimpleNamespace

    from megatron_patch.training.callbacks.wandb import WeightsAndBiases

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    for text in ("../../x", "a?b=c", "", "\x1b[2J", "x" * 99, SECRET + "x"):
        (folder / "wandb_run_id").unlink(missing_ok=True)
        (folder / "wandb_run_id").write_text(text)
        found = WeightsAndBiases("p", None, folder, {})._run_id()
        assert found.isalnum() and found == WeightsAndBiases("p", None, folder, {})._run_id()
    (folder / "wandb_run_id").unlink()
    (folder / "wandb_run_id").symlink_to(victim.with_name("made"))
    assert WeightsAndBiases("p", None, folder, {})._run_id().isalnum()
