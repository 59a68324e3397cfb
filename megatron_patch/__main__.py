"""The installed command `megatron-patch`, also `python -m megatron_patch`: see `cli/program.py`.

Several ranks: `deepspeed --module megatron_patch SUBCOMMAND …`, `torchrun -m megatron_patch SUBCOMMAND …`.
"""

from __future__ import annotations

import sys

from megatron_patch.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
