"""Runs the documents' commands for tools as they are written, in a folder with the files that a reader would have."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs import run_program
from tests.test_docs import ROOT, TOOLS

SENTENCES = ["the cat sat on the mat", "a dog sat on the log", "Once upon a time there was a cat", "the mat is on the log"]
STUDY = """num-layers: 1
hidden-size: 16
num-attention-heads: 2
ffn-hidden-size: 32
train-tokens: 4096
seq-length: 32
micro-batch-size: 4
global-batch-tokens: 512
lr: 5e-3
lr-warmup-fraction: 0.02
"""
"""In place of configurations whose studies take minutes to hours."""
NAMES = {"PREFIX": "my_text_document", "WEB": "my_text_document", "CODE": "other_text_document", "K": "2", "FOLDER": "task_data"}
NAMES |= {"DIR": "exported", "CKPT": "imported"}
"""Values for the names that stand for the reader's own files and numbers."""


def lines() -> list[str]:
    """Returns each command once, in the order of the documents, with optional flags and with values for names such as PREFIX.

    Commands that compare studies come last, since they read what the studies wrote.
    """
    found = []
    for _, line in TOOLS:
        line = line.replace("[", "").replace("]", "")
        found.append(re.sub(r"\b(" + "|".join(NAMES) + r")\b", lambda match: NAMES[match.group(1)], line))
    return sorted(dict.fromkeys(found), key=lambda line: "compare_studies" in line)


def documents(count: int, start: int = 0) -> str:
    return "".join(json.dumps({"text": f"{SENTENCES[(n * 7) % 4]} {n} " * (3 + n % 9)}) + "\n" for n in range(start, start + count))


def put_tasks(folder: Path) -> None:
    """Writes the data sets of two tasks, one question each, in the folders that the hub uses."""
    story = {"ind": 1, "activity_label": "Cats", "ctx_a": "The cat sat.", "ctx_b": "it", "ctx": "The cat sat. it"}
    story.update(
        endings=["slept.", "is a log.", "was the mat.", "once upon."], label="0", source_id="x", split="val", split_type="indomain"
    )
    question = {"id": "1", "question": "Who sat?", "choices": {"text": ["the cat", "the mat"], "label": ["A", "B"]}, "answerKey": "A"}
    for name, row in (("Rowan/hellaswag", story), ("allenai/ai2_arc/ARC-Easy", question)):
        (folder / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """Returns the reader's folder with programs, configurations and text."""
    home = tmp_path_factory.mktemp("reader")
    for name in ("tools", "examples", "docs"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_gpt_patch.py", home)
    for path in (home / "examples" / "replicate").glob("study_*.yaml"):
        path.write_text(STUDY)
    shutil.rmtree(home / "examples" / "replicate" / "records")  # they are those of the studies that take hours
    for folder in ("shards", "books"):
        (home / folder).mkdir()
    (home / "a.jsonl").write_text(documents(120))
    (home / "shards" / "one.jsonl.gz").write_bytes(gzip.compress(documents(200, 120).encode()))
    (home / "books" / "one.txt").write_text("\n\n".join(" ".join(SENTENCES[(n + m) % 4] for m in range(9)) for n in range(400)))
    script = re.search(r"```text\n(#!/bin/bash.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL)
    assert script
    (home / "pretrain.sh").write_text(script.group(1))
    (home / "arguments.txt").write_text("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --train-iters 10 --global-batch-size 8")
    (home / "ds_config.json").write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}')
    put_tasks(home / "task_data")
    (home / "wiki.test.raw.txt").write_text(" ".join(SENTENCES[n % 4] for n in range(300)))
    return home


def run(home: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "150"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return run_program(*shlex.split(line)[1:], *more, cwd=home, environment=environment)


def prepare(home: Path) -> None:
    """Makes what later commands read: a tokenizer, then two datasets, shards of one, and runs of two stages."""
    trained = run(home, "python tools/train_tokenizer.py --input a.jsonl 'shards/*.jsonl.gz' --vocab-size 300 --output .")
    assert trained.returncode == 0, trained.stderr
    encode = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --append-eod"
    outputs = {"my": "", "other": "", "web_shard-0": "--shard 0/2", "web_shard-1": "--shard 1/2"}
    for prefix, words in outputs.items():
        done = run(home, f"python tools/preprocess_data.py --input a.jsonl shards/one.jsonl.gz --output-prefix {prefix} {encode} {words}")
        assert done.returncode == 0, done.stderr
    plan = "--seq-length 512 --micro-batch-size 1 --global-batch-size 4 --patch-size 2 --patch-fraction 0.5 --train-tokens 16384 --lr 1e-3"
    model = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32"
    for save in ("SAVE", *(f"runs/{name}" for name in ("patch", "token"))):
        done = run(home, f"python pretrain_gpt_patch.py {model} {plan} --data-path my_text_document --split 80,20,0 --save {save}")
        assert done.returncode == 0, done.stdout + done.stderr


def run_checked(home: Path, line: str, *more: str) -> None:
    done = run(home, line, *more)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def run_all(home: Path, commands: Sequence[str]) -> None:
    """Runs commands in order, since a later one may read what an earlier one wrote."""
    trained: str | None = None
    for line in commands:
        if "preprocess_data" in line:
            run_checked(home, line, "--overwrite")  # `prepare` wrote the same files
        elif "study.py --text" not in line:
            run_checked(home, line)
        elif "--seeds" in line and "--arms" not in line:
            run_checked(home, line, "--arms", "token")  # all arms would be dozens of runs
        else:
            # The commands of published studies: all arms are planned; one is trained, in the first study, whose folder serves as the others'.
            run_checked(home, line, "--plan")
            output = re.search(r"--output (\S+)", line)
            assert output
            if trained is None:
                run_checked(home, line, "--arms", "token", "--seeds", "1", "--budget", "4k")
                trained = output.group(1)
            else:
                shutil.copytree(home / trained, home / output.group(1))


@pytest.mark.timeout(900)
def test_every_command_of_a_tool_runs_as_it_is_written(reader):
    prepare(reader)
    commands = lines()
    studies = [line for line in commands if "examples/replicate/" in line and "plan.py" not in line]
    others = [line for line in commands if line not in studies]
    with ThreadPoolExecutor(2) as pool:
        for lane in [pool.submit(run_all, reader, part) for part in (studies, others)]:
            lane.result()
    assert (reader / "report.html").is_file() and (reader / "sensitivity.png").is_file()
    assert (reader / "exported" / "config.json").is_file() and (reader / "web_text_document.bin").is_file()
    assert "| `token` | 3 |" in (reader / "docs" / "replication.md").read_text()
