"""Imported first by every program: stops if `import megatron_patch` would import another project's package of the same name.

Alibaba's Pai-Megatron-Patch also has a Python package called megatron_patch. Python imports the one that comes first on its path, and the
wrong one would fail later with an ImportError. The package is located and not imported, so that no code of the other project runs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_OURS = ("stages.py", "training/pretrain.py", "ops/plain.py")


def complaint(home: Path) -> str | None:
    """Returns the error, in three parts, about the package that `import megatron_patch` would import; None if it is this project's.

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


_complaint = complaint(Path(__file__).resolve().parent.parent)
if _complaint is not None:
    print(_complaint, file=sys.stderr)
    sys.exit(2)
