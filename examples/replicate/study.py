#!/usr/bin/env python
"""Trains every arm with every seed at equal cost, and writes a table and a plot: `python examples/replicate/study.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tools"))
import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.study import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
