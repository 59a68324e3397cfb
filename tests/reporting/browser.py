"""Opens pages in a headless Chromium. In: an HTML file. Out: its elements after its scripts have run, as HTML text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
MISSING = "there is no Chromium; on Debian: apt install --no-install-recommends chromium"

_FLAGS = (
    "--headless",
    "--no-sandbox",  # it needs rights that containers do not have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=1000",
)


def open_page(page: Path, profile: Path) -> str:
    """Returns the document of a page after its scripts have run.

    Args:
        page: the HTML file.
        profile: an empty folder for the browser's own files.
    """
    assert CHROMIUM is not None
    words = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=200).stdout


def version() -> str:
    """Returns the name and version of the browser."""
    assert CHROMIUM is not None
    return subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
