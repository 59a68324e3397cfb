"""Starts training without a checkout: `deepspeed --num_gpus 8 --module megatron_patch.pretrain …`, `torchrun -m megatron_patch.pretrain …`.

It is `megatron-patch pretrain` under the name of a module, for launchers.
"""

from __future__ import annotations

import sys

from megatron_patch.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
