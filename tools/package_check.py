"""Imported first by every program here: refuses to go on with another project's package of the same name.

Alibaba's Pai-Megatron-Patch also has a Python package called megatron_patch. Whichever comes first on the path is imported, and the other's
failure would be an ImportError from somewhere inside. The package is found and not imported, so that no foreign code runs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_OURS = ("stages.py", "training/pretrain.py", "ops/plain.py")


def complaint(home: Path) -> str | None:
    """What is wrong with the package that `import megatron_patch` would take, in three parts; None if it is ours.

    Args:
        home: the checkout that this program belongs to.
    """
    spec = importlib.util.find_spec("megatron_patch")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    if any(all((place / name).is_file() for name in _OURS) for place in places):
        return None
    found = f"another project's: {places[0]}" if places else "not installed"
    return (
        f"ConfigError: the Python package megatron_patch is {found}\n"
        f"  Allowed: this project's, {home / 'megatron_patch'}\n"
        f"  What to do: pip install -e {home}, or PYTHONPATH={home}; Pai-Megatron-Patch needs an environment of its own"
    )


_complaint = complaint(Path(__file__).resolve().parent.parent)
if _complaint is not None:
    print(_complaint, file=sys.stderr)
    sys.exit(2)
