#!/usr/bin/env python
"""Converts text to the indexed datasets that pretraining reads: `python tools/preprocess_data.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.preprocess_data import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
