"""Runs the Python blocks of docs/integrations.md one after another, and its two commands."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch import library

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "integrations.md").read_text()


def test_the_blocks_run_one_after_another(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "integrations"), *sys.path])
    torch.manual_seed(0)
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)):
            exec(compile(source, f"block {number}", "exec"), names)
    lines = printed.getvalue().splitlines()
    assert lines[:2] == ["patch 4 16 1", "token 1 8 4"] and lines[-1] == "torch.Size([10, 32, 4]) torch.Size([10, 32, 4])"
    assert len(names["losses"]) == 24 and names["losses"][15] < names["losses"][0] - 0.5
    assert names["losses"][23] < names["losses"][16] - 0.5
    assert names["trainer"].state.global_step == names["plan"].steps and (tmp_path / "run" / "checkpoint-4").is_dir()


def test_the_commands_train_and_resume(tmp_path):
    block = next(block for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "plain_loop.py" in block)
    steps = []
    for line in block.splitlines():
        _, script, *words = shlex.split(line)
        done = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        steps += [json.loads(record)["step"] for record in done.stdout.splitlines()]
    assert steps == list(range(1, 97))


def test_the_page_has_every_name_and_every_file():
    for name in library.__all__:
        assert f"`{name}`" in PAGE or name in ("Stage", "StagePlan", "MegatronPatchError"), name
    for path in (ROOT / "examples" / "integrations").glob("*.py"):
        assert f"`{path.name}`" in PAGE
