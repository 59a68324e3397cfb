#!/usr/bin/env python
"""Records the machine as a figure; fails at once without a GPU.

python benchmarks/device_facts.py

This is the first step of benchmarks/on_gpu.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
from datetime import date

import torch
from _measure import machine, record

LIBRARIES = ("deepspeed", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "megatron-core", "quack-kernels", "numpy")


def version_of(name: str) -> str | None:
    """Returns the installed version of a library, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line_of(*command: str) -> str | None:
    """Returns the first line that a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    """Records and prints the machine.

    Raises:
        SystemExit: there is no GPU, and --allow-cpu is not given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-cpu", action="store_true", help="also record a machine without a GPU")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.allow_cpu:
        raise SystemExit("no GPU found: torch.cuda.is_available() is False; check nvidia-smi, or give --allow-cpu")
    facts = machine(torch.device("cuda" if cuda else "cpu"))
    facts["libraries"] = {name: version for name in LIBRARIES if (version := version_of(name))}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "memory_gib": properties.total_memory / 2**30,
            "processors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "shared_memory_kib": properties.shared_memory_per_block_optin / 2**10,
            "gpus": torch.cuda.device_count(),
        }
        # Fails early if the device does not work.
        ones = torch.ones(1 << 20, device="cuda")
        assert float((ones + ones).sum()) == 2 << 20
    record("machine", date=date.today().isoformat(), **facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"{facts.get('gpu') or facts['processor']}, torch {facts['torch']}, {facts['cores']} cores")


if __name__ == "__main__":
    main()
