"""A run's folder is taken back to the step that the run resumes from: each record once, for all ranks that the run ever had."""

from __future__ import annotations

import json
import os

import pytest

from megatron_patch.errors import CheckpointError
from megatron_patch.stages import Progress
from megatron_patch.training.rollback import roll_back


def write(path, *records, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(kind, step, **more):
    return {"type": kind, "step": step, **more}


METRICS = [
    record("start", 0), record("step", 1), record("step", 2), record("evaluation", 2), record("save", 2), record("switch", 2),
    record("step", 3), record("evaluation", 3), record("end", 3), record("start", 3), record("step", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "progress", "kept", "evaluated"),
    [
        (0, Progress(0, 0), [METRICS[0], METRICS[9]], None),
        (1, Progress(0, 1), [*METRICS[:2], METRICS[9]], None),
        (2, Progress(0, 2), [*METRICS[:5], METRICS[9]], 2),
        (2, Progress(1, 0), [*METRICS[:6], METRICS[9]], 2),
        (3, Progress(1, 1), METRICS[:10], 3),
        (4, Progress(1, 2), METRICS, 3),
    ],
)
def test_metrics_keep_each_record_up_to_the_step(tmp_path, step, progress, kept, evaluated):
    write(tmp_path / "metrics.jsonl", *METRICS, end='{"type": "step", "step": 1, "lo')  # left incomplete by a kill
    assert roll_back(tmp_path, step, progress) == evaluated
    assert read(tmp_path / "metrics.jsonl") == kept


def test_spans_of_all_ranks_and_samples_are_taken_back(tmp_path):
    for rank in range(3):
        write(tmp_path / "spans" / f"rank-{rank:05d}.jsonl", *({"step": step, "spans": [rank]} for step in range(1, 6)))
    write(tmp_path / "samples.jsonl", *(record("sample", step) for step in (2, 4, 5)))
    write(tmp_path / "events.jsonl", record("skip", 5))
    assert roll_back(tmp_path, 4, Progress(0, 4)) is None
    for rank in range(3):
        assert [line["step"] for line in read(tmp_path / "spans" / f"rank-{rank:05d}.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read(tmp_path / "samples.jsonl")] == [2, 4]
    assert [line["step"] for line in read(tmp_path / "events.jsonl")] == [5], "events are a log"


def test_lines_that_are_no_records_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n"text"\n\xff\xfe\n{"type": "step", "step": "1"}\n{"type": "step", "step": true}\n{"type": "step", "step": 1}')
    roll_back(tmp_path, 5, Progress(0, 5))
    assert [line["step"] for line in read(path)] == [True, 1]


def test_an_empty_folder_stays_empty_and_a_full_disk_is_an_error(tmp_path, monkeypatch):
    assert roll_back(tmp_path, 3, Progress(0, 3)) is None and not list(tmp_path.iterdir())
    write(tmp_path / "metrics.jsonl", *METRICS)

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        roll_back(tmp_path, 1, Progress(0, 1))
    assert read(tmp_path / "metrics.jsonl") == METRICS


def test_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    write(tmp_path / "metrics.jsonl", *METRICS)
    (tmp_path / "metrics.jsonl.partial").symlink_to(victim)
    roll_back(tmp_path, 1, Progress(0, 1))
    assert victim.read_text() == "mine" and len(read(tmp_path / "metrics.jsonl")) == 3
