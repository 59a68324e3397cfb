"""Imported first by every program: stops with one clear message when the wrong package or the wrong Python would be used.

Alibaba's Pai-Megatron-Patch also has a Python package called megatron_patch, and Python imports whichever comes first on the path. The
Python of a new shell lacks the requirements until the virtual environment is activated. Both would end in a traceback from an inner import.
This file looks modules up without importing them, so no foreign code runs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

_OURS = ("stages.py", "training/pretrain.py", "ops/plain.py")
REQUIREMENTS = (
    "torch",
    "deepspeed",
    "numpy",
    "tyro",
    "rich",
    "yaml",
    "orjson",
    "tokenizers",
    "fastokens",
    "sentencepiece",
    "zstandard",
    "xxhash",
    "safetensors",
    "matplotlib",
)
"""Modules of the packages that pyproject.toml requires."""


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


def missing_requirements(home: Path, modules: Sequence[str] = REQUIREMENTS) -> str | None:
    """Returns one sentence that names this Python, the modules that it lacks and the command to run; None if it has all of them.

    Args:
        home: the checkout that this program belongs to.
        modules: names of top-level modules.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    activate = "`source .venv/bin/activate`"
    do = activate if (home / ".venv" / "bin" / "python").exists() else f"`make venv`, then {activate}"
    return f"ConfigError: {sys.executable} lacks required packages ({', '.join(missing)}): in {home}, run {do}"


_home = Path(__file__).resolve().parent.parent
_error = wrong_package(_home) or missing_requirements(_home)
if _error is not None:
    print(_error, file=sys.stderr)
    sys.exit(2)
