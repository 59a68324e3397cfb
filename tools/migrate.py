#!/usr/bin/env python
"""Turns a command line of Megatron into a YAML file: `python tools/migrate.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.migrate import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
