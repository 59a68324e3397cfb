#!/usr/bin/env python
"""Trains a byte-level BPE tokenizer on text: `python tools/train_tokenizer.py --help`."""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
