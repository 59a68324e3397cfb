"""Histories as one HTML file that needs nothing else: styles, script and data are inside, and it asks no network.

In: `History` records. Out: the text of a page. The charts are drawn by `report.js` from the very numbers of the metrics files.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from megatron_patch import __version__
from megatron_patch.errors import DataError
from megatron_patch.reporting.history import History, read_history, unlike_options
from megatron_patch.utils.files import write_durably


def render(histories: Sequence[History], title: str) -> str:
    """The page.

    Args:
        histories: the runs, in the order of their colours.
        title: the page's heading, any text.
    """
    data = {
        "runs": [asdict(history) for history in histories],
        "options": unlike_options(histories),
        "version": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    parts = {
        "title": html.escape(title),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        # Inside a script element only "</" and "<!--" could end the data: no "<" is left in it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = _asset("report.html")
    before, *pieces = page.split("{{")
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        before += parts[name.strip()] + rest
    return before


def _asset(name: str) -> str:
    return files("megatron_patch.reporting").joinpath(name).read_text(encoding="utf-8")


def write_report(saves: Sequence[Path], output: Path, labels: Sequence[str] | None = None, title: str | None = None) -> list[History]:
    """Reads runs and writes their report.

    Args:
        saves: folders of runs.
        output: the HTML file.
        labels: one for each run; by default the folders' names.
        title: by default the labels.

    Returns:
        What was read.

    Raises:
        DataError: a run without metrics, labels that do not match, or a file that cannot be written.
    """
    if labels is not None and len(labels) != len(saves):
        raise DataError(f"{len(labels)} labels for {len(saves)} runs", "one label a run", "give as many labels as folders")
    histories = [read_history(save, labels[index] if labels else None) for index, save in enumerate(saves)]
    try:
        write_durably(output, render(histories, title or " · ".join(history.label for history in histories)))
    except OSError as error:
        raise DataError(f"cannot write {output}: {error}", "a file in a folder that exists", "change --output") from error
    return histories
