"""The text of `--version`. In: the installed packages' metadata; nothing is imported. Out: a text."""

from __future__ import annotations

import importlib.metadata
import platform

from megatron_patch import __version__


def versions() -> str:
    """Returns the versions of the package, of torch, of DeepSpeed and of Python, one on each line."""
    found = [f"megatron_patch {__version__}"]
    for package in ("torch", "deepspeed"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}: not installed")
    return "\n".join([*found, f"Python {platform.python_version()}"])
