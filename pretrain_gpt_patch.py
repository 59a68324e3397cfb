#!/usr/bin/env python
"""Pretrains a GPT-like model on patches of tokens first and on single tokens last: `deepspeed pretrain_gpt_patch.py --help`."""

import sys

import megatron_patch

if not getattr(megatron_patch, "PROJECT", "").startswith("megatron_patch: patches"):
    # Alibaba's Pai-Megatron-Patch has a package of this name.
    sys.exit(
        f"ConfigError: the package megatron_patch that Python finds is another project's: {list(megatron_patch.__path__)}\n"
        "  Allowed: this project's, which is beside pretrain_gpt_patch.py or installed by `pip install -e .`\n"
        "  What to do: take the other one out of PYTHONPATH and out of the environment"
    )

from megatron_patch.training.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
