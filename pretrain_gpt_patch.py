#!/usr/bin/env python
"""Pretrains a GPT-like model on patches of tokens first and on single tokens last: `deepspeed pretrain_gpt_patch.py --help`."""

import sys

import tools.package_check  # noqa: F401 - before the package itself
from megatron_patch.training.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
