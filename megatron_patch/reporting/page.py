"""A report about runs as one HTML file that contains its styles, script and data and needs no network.

In: `History` records. Out: the text of the page. `report.js` draws the charts from the numbers of the metrics files.

Names, options and events come from files that others may have written. They are data, which `report.js` shows as text. Should that fail,
the page's Content-Security-Policy still holds: a browser runs this one script, applies these styles, and loads and sends nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from megatron_patch import __version__
from megatron_patch.errors import DataError
from megatron_patch.reporting.history import History, differing_options, labeled, read_history
from megatron_patch.utils.console import one_line
from megatron_patch.utils.files import write_durably


def render(histories: Sequence[History], title: str) -> str:
    """Returns the HTML text of a report.

    Args:
        histories: the runs, in the order of their colors.
        title: heading of the page; any text, which is escaped.
    """
    data = {
        "runs": [asdict(history) for history in histories],
        "options": differing_options(histories),
        "version": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    style, script = _asset("report.css"), _asset("report.js")
    parts = {
        "policy": html.escape(content_security_policy(style, script)),
        "title": html.escape(one_line(title)),
        "style": style,
        "script": script,
        # "</" or "<!--" in the data would end the script element, so every "<" is escaped.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = _asset("report.html")
    before, *pieces = page.split("{{")
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        before += parts[name.strip()] + rest
    return before


def content_security_policy(style: str, script: str) -> str:
    """Returns the policy of a page that consists of its own text only.

    Args:
        style: content of its style element.
        script: content of its script element.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_source_hash(script)}'",
            f"style-src '{_source_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return files("megatron_patch.reporting").joinpath(name).read_text(encoding="utf-8")


def write_report(saves: Sequence[Path], output: Path, labels: Sequence[str] | None = None, title: str | None = None) -> list[History]:
    """Reads runs and writes a report about them.

    Args:
        saves: folders of runs.
        output: HTML file to write.
        labels: one label per run; None uses the names of the folders.
        title: heading of the page; None uses the labels.

    Returns:
        The histories of the runs.

    Raises:
        DataError: a run has no metrics, the number of labels is wrong, or the file cannot be written.
    """
    histories = [read_history(save, label) for save, label in labeled(saves, labels)]
    try:
        write_durably(output, render(histories, title or " · ".join(history.label for history in histories)))
    except OSError as error:
        raise DataError(f"cannot write {output}: {error}", "a writable file in an existing folder", "change --output") from error
    return histories
