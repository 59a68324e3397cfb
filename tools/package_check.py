"""Imported first by every program: stops with one clear message when the wrong package or the wrong Python would be used.

Alibaba's Pai-Megatron-Patch also has a Python package called megatron_patch, and Python imports whichever comes first on the path. The
Python of a new shell lacks the requirements until the virtual environment is activated. Both would end in a traceback from an inner import.
This file looks the package up before it imports any of it, so no foreign code runs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_OURS = ("stages.py", "training/pretrain.py", "ops/plain.py")


def wrong_package(home: Path) -> str | None:
    """Returns an error in three parts if `import megatron_patch` would not import this project's package, otherwise None.

    Args:
        home: the root of this project's checkout.
    """
    spec = importlib.util.find_spec("megatron_patch")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    if any(all((folder / name).is_file() for name in _OURS) for folder in folders):
        return None
    found = f"another project's: {folders[0]}" if folders else "not installed"
    return (
        f"ConfigError: the Python package megatron_patch is {found}\n"
        f"  Allowed: this project's, {home / 'megatron_patch'}\n"
        f"  What to do: run pip install -e {home}, or set PYTHONPATH={home}; install Pai-Megatron-Patch in another environment"
    )


def _problem() -> str | None:
    wrong = wrong_package(Path(__file__).resolve().parent.parent)
    if wrong is not None:
        return wrong
    from megatron_patch.requirements import check_required

    error = check_required()
    return None if error is None else f"{type(error).__name__}: {error}"


_error = _problem()
if _error is not None:
    print(_error, file=sys.stderr)
    sys.exit(2)
