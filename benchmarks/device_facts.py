#!/usr/bin/env python
"""Which machine this is, recorded as a figure: the first step of a call (benchmarks/on_gpu.py), which fails at once where there is no GPU.

python benchmarks/device_facts.py
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
    """The installed version of a library, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line_of(*command: str) -> str | None:
    """The first line that a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    """Records the machine; without a GPU it ends with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-cpu", action="store_true", help="describe a machine without a GPU, too")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.allow_cpu:
        raise SystemExit("no GPU: torch.cuda.is_available() is False; see nvidia-smi")
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
        # The device works at all.
        ones = torch.ones(1 << 20, device="cuda")
        assert float((ones + ones).sum()) == 2 << 20
    record("machine", date=date.today().isoformat(), **facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"{facts.get('gpu') or facts['processor']}, torch {facts['torch']}, {facts['cores']} cores")


if __name__ == "__main__":
    main()
