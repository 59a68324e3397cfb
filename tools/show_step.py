#!/usr/bin/env python
"""Shows the text that a step read: `python tools/show_step.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.show_step import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
