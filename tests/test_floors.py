"""No import runs up: a room of the package imports rooms of lower floors, and no room of its own floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_patch"
FLOORS = [  # from the ground up
    {"programs"},
    {"exit_codes", "credentials"},
    {"errors"},
    {"utils"},
    {"requirements"},
    {"stages", "tokenizers", "parallel", "ops", "raw_text", "checkpoint"},
    {"model", "data"},
    {"preprocess", "config", "evaluation"},
    {"optimizers"},
    {"engine"},
    {"planning", "convert"},
    {"training"},
    {"reporting", "replication", "library"},
    {"cli"},
    {"api", "__main__", "pretrain"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere in its code, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "megatron_patch":
            names |= {node.module} if "." in node.module else {f"megatron_patch.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("megatron_patch.")}
    return {name.split(".")[1] for name in names} - {"__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room != "__init__":
        above = {other for other in imported_rooms(path) if other != room and LEVEL[other] >= LEVEL[room]}
        assert not above, f"{room} imports {sorted(above)}, which are not below it"
