"""Runs the Python blocks of docs/api.md as they are written, one after another in one process, and checks what they did."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_patch import api
from megatron_patch.training.callbacks.base import Callback
from tests.api.runs import without_launcher
from tests.distributed.ranks import run_ranks

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
SENTENCES = ["Once upon a time there was a cat. ", "The dog sat on the log, ", "and the cat sat on the mat. "]


def execute(folder: Path) -> dict[str, Any]:
    without_launcher()
    os.chdir(folder)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)):
            exec(compile(source, f"block {number}", "exec"), names)
    result = names["result"]
    return {
        "printed": printed.getvalue(),
        "outputs": names["data"].outputs,
        "fits": names["predicted"].fits,
        "steps": (result.step, len(names["norms"]), len(names["losses"]), result.finished),
        "seen": [kind for kind, _ in names["diary"].seen],
        "positions": [len(names[name]) for name in ("logits", "patches")],
        "own": repr(names["own"]),
    }


def test_the_blocks_run_one_after_another(tmp_path):
    lines = ["".join(SENTENCES[(n + m) % 3] for m in range(5 + n % 4)) for n in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (found,) = run_ranks(execute, 1, tmp_path / "logs", tmp_path)
    steps, *others = found["steps"]
    assert found["outputs"] == ("my_text_document",) and found["fits"] and others == [steps, steps, True]
    assert found["seen"] == ["start", "evaluation", "save", "switch", "evaluation", "save", "end"]
    assert found["positions"] == [4, 2] and "runs/half" in found["own"]
    assert "did you mean patch_size?" in found["printed"]


def test_the_page_names_every_function_and_every_hook():
    for name in api.__all__:
        assert f"`{name}`" in PAGE, name
    hooks = [name for name in vars(Callback) if name.startswith("on_") or name == "close"]
    assert re.findall(r"^\| `(on_\w+|close)` \|", PAGE, re.MULTILINE) == hooks
