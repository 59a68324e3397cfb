#!/usr/bin/env python
"""Writes a report about runs as one HTML file that needs no network: `python tools/report.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.report import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
