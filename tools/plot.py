#!/usr/bin/env python
"""Plots the held-out token loss of runs against tokens and against cost: `python tools/plot.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.plot import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
