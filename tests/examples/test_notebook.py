"""Runs the cells of examples/notebook.ipynb as they are stored, in one process without a launcher, and checks what they made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.api.runs import without_launcher
from tests.distributed.ranks import run_ranks

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "notebook.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def execute(folder: Path) -> dict[str, Any]:
    without_launcher()
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(folder)
    names: dict[str, Any] = {}
    for number, source in enumerate(cells("code")):
        exec(compile(source, f"cell {number}", "exec"), names)
    first, second = names["first"], names["second"]
    return {
        "patch sizes": [stage.patch_size for stage in names["config"].plan.stages],
        "ends": [(result.stop_reason, str(result.checkpoint)) for result in (first, second)],
        "held-out": [[one["token_loss"] for one in result.records("evaluation")] for result in (first, second)],
        "curves": [len(axes.lines) for axes in names["figure"].axes],
        "norms": len(names["norms"]) - second.step,
        "on data": names["on_data"]["token_loss"] - second.token_loss,
        "bits": names["on_text"]["bits_per_byte"],
    }


def test_the_cells_run_one_after_another(tmp_path):
    (found,) = run_ranks(execute, 1, tmp_path / "logs", tmp_path)
    assert found["patch sizes"] == [4, 1] and found["curves"] == [2, 2] and found["norms"] == 0
    assert found["ends"] == [("done", f"runs/notebook/{name}/step-00000156") for name in ("k4", "k2")]
    assert all(losses[-1] < min(losses[:-1]) for losses in found["held-out"])
    assert abs(found["on data"]) < 0.2 and 3 < found["bits"] < 5


def test_the_stored_notebook_has_no_outputs_and_only_python():
    stored = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code) and len(code) > 10
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5) and len({cell["id"] for cell in stored["cells"]}) == len(
        stored["cells"]
    )
    for source in cells("code"):
        compile(source, "cell", "exec")  # no magics, so that the code also runs elsewhere
