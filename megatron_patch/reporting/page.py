"""The page: runs' data inside one HTML file that needs nothing else. In: `RunData`. Out: text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.reporting.read import RunData, differing_options, read_run

_PLACE = "__DATA__"


def page_data(runs: Sequence[RunData], title: str) -> dict[str, Any]:
    """What the page shows."""
    return {
        "title": title,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "runs": [run.to_json() for run in runs],
        "differing": differing_options(runs),
    }


def make_page(runs: Sequence[RunData], title: str) -> str:
    """The whole file; numbers that are not finite become null, and no text of a run can end the element that holds it."""
    template = resources.files("megatron_patch.reporting").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(_finite(page_data(runs, title)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    before, after = template.split(_PLACE)
    return before + text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + after


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_report(folders: Sequence[Path], output: Path, names: Sequence[str] | None = None, title: str | None = None) -> list[RunData]:
    """Reads runs and writes their page.

    Args:
        folders: of the runs.
        output: the HTML file.
        names: one for each run; by default their folders'.
        title: of the page.

    Raises:
        DataError: a folder that is no run's, or a file that cannot be written.
    """
    if names is not None and len(names) != len(folders):
        raise DataError(f"{len(names)} names for {len(folders)} runs", "one name a run", "give as many --names as runs")
    runs = [read_run(folder, names[index] if names else None) for index, folder in enumerate(folders)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(make_page(runs, title or " · ".join(run.name for run in runs)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}", "a writable file", "change --output") from error
    return runs
