"""Files that the programs read as a whole: whatever is put in their place, the error names the file, and nothing is allocated for it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_patch.config.parsing import parse
from megatron_patch.config.yaml_files import load_yaml
from megatron_patch.convert.from_megatron import find_file
from megatron_patch.convert.weight_files import open_weights
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.training.faults.exit_protocol import _last_report
from megatron_patch.training.rollback import _filter
from megatron_patch.utils.files import bounded_lines
from tests.distributed.runs import DATA, MODEL, ROOT, start_program
from tests.faults.conftest import PLAN
from tests.faults.test_credentials import tool


def sparse(path: Path, size: int = 200 << 30) -> str:
    """A file of 200 GB that takes no space."""
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


@pytest.fixture
def corpus_and_model(corpus):
    return [*MODEL, *DATA, *PLAN, "--data-path", corpus]


@pytest.mark.parametrize("kind", ["sparse", "/dev/zero", "pipe", "folder"])
@pytest.mark.parametrize("flag", ["--config", "--deepspeed_config", "--data-path"])
def test_the_program_refuses_what_is_no_small_file(tmp_path, corpus_and_model, kind, flag, capsys):
    path = tmp_path / "file"
    if kind == "sparse":
        sparse(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path(kind)
    words = [*corpus_and_model[:-2], "--vocab-size", "32"] if flag == "--data-path" else corpus_and_model
    value = f"@{path}" if flag == "--data-path" else str(path)
    assert start_program([*words, flag, value, "--save", str(tmp_path / "run")]) == (3 if flag == "--data-path" else 2)
    output = "".join(capsys.readouterr())
    assert str(path) in output and "What to do" in output and "Traceback" not in output
    if kind in ("sparse", "/dev/zero") and flag != "--data-path":
        assert "and such a file may have up to 4,194,304" in output


def test_a_plan_refuses_ceilings_that_are_no_small_file(tmp_path, monkeypatch, capsys):
    for path in (sparse(tmp_path / "file"), "/dev/zero"):
        assert tool("plan", [*MODEL, "--train-tokens", "1M", "--vocab-size", "32", "--ceilings", path], monkeypatch) == 2
        assert "and such a file may have up to 1,048,576" in capsys.readouterr().err
    (tmp_path / "file").write_text("[" * 100_000)
    assert tool("plan", [*MODEL, "--train-tokens", "1M", "--vocab-size", "32", "--ceilings", str(tmp_path / "file")], monkeypatch) == 2


def test_a_configuration_may_come_out_of_a_pipe(tmp_path):
    """As in --config <(sed s/SEED/$RANDOM/ template.yaml), and from standard input."""
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    text = "\ufeff" + json.dumps({**model, "lr": 0.5})
    source, target = os.pipe()
    os.write(target, text.encode())
    os.close(target)
    assert parse(["--config", f"/dev/fd/{source}"]).options.schedule.lr == 0.5
    os.close(source)
    code = "import sys; from megatron_patch.config.parsing import parse; print(parse(['--config', '/dev/stdin']).options.schedule.lr)"
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "0.5\n"
    with pytest.raises(ConfigError, match="missing"):
        parse(["--config", "/dev/null"])


def test_files_of_a_checkpoint_and_of_a_run_are_bounded(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests/distributed/written_by_0_1/run", run)
    folder = next(run.glob("step-*"))
    for name in ("manifest.json", "trainer_state.json"):
        sparse(folder / name)
    assert tool("inspect_checkpoint", [str(run), "--explain"], monkeypatch) == 4
    output = "".join(capsys.readouterr())
    assert "it has 214,748,364,800 bytes" in output.replace("\n", " ") and "Traceback" not in output
    assert tool("report", [str(run), "--output", str(tmp_path / "report.html")], monkeypatch) == 0
    assert "the configuration is unknown" in (tmp_path / "report.html").read_text()
    for name in ("generate", "evaluate"):
        words = ["--load", str(run), *(["--data-path", "x"] if name == "evaluate" else ["--prompt", "a"])]
        assert tool(name, words, monkeypatch) == 4
        output = "".join(capsys.readouterr())
        assert "What to do" in output and "Traceback" not in output


def test_files_of_other_programs_are_bounded(tmp_path, monkeypatch):
    sparse(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="it has 214,748,364,800 bytes"):
        open_weights(tmp_path)
    sparse(tmp_path / "latest_checkpointed_iteration.txt")
    with pytest.raises(CheckpointError, match="it has 214,748,364,800 bytes, and such a file may have up to 1,000"):
        find_file(tmp_path)
    sparse(tmp_path / "config.json")
    assert tool("convert_checkpoint", ["from-hf", "--input", str(tmp_path), "--output", str(tmp_path / "out")], monkeypatch) == 4


def test_a_line_that_is_too_long_is_skipped_in_pieces(tmp_path):
    text = b'{"a": 1}\n' + b"x" * 25 + b"\n" + b"0123456789\n" + b"012345678\n" + b"end"
    assert list(bounded_lines(io.BytesIO(text), 10)) == [b'{"a": 1}\n', None, None, b"012345678\n", b"end"]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b" " * (3 << 20) + b'{"step": 2}\n{"step": 3}')
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 3}]
    _filter(path, lambda record: True)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_the_end_of_a_long_list_of_events_is_read(tmp_path):
    end = {"type": "end", "reason": "x", "message": "m", "code": 3, "rank": 1, "host": "h", "time": 1e11}
    sparse(tmp_path / "events.jsonl")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\n" + json.dumps(end).encode() + b"\n")
    report = _last_report(tmp_path)
    assert report is not None and report.message == "m"


def test_the_values_of_a_configuration_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr(yaml, "safe_load", lambda text: pytest.fail("each value would take about a kilobyte"))
    for text in ("[" + "a," * 110_000 + "]", "- a\n" * 110_000, "[" + "[]," * 110_000 + "]"):
        with pytest.raises(ValueError, match="more than 100,000 values"):
            load_yaml(text)
    for text in ('{"a":' * 100_000, "[" * 100_000, "- " * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            load_yaml(text)
