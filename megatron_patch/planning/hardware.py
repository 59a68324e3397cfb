"""The memory and the speed of devices and links: a small table, which a user's measurements override.

In: a device's name, optionally a JSON file of measurements. Out: `Hardware`. Peaks and bandwidths come from data sheets, memory sizes from
the driver. Efficiencies (the shares of these peaks that a training step reaches) are **estimates**: they fit the speeds that others have
published (`planning/published.py`). Your own measurements should replace them. Prices are round examples, not offers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import peak_flops
from megatron_patch.utils.files import read_small, reason

_MOST_BYTES = 1 << 20

RESERVED_GIB = 2.5
"""GiB of a device that are not left for a run's tensors: 0.5 to 0.9 that the driver counts and torch cannot allocate (torch reports 79.1 to
79.25 on an H100, 79.15 to 79.25 on an A100, 139.7 to 139.8 on an H200, 178.35 on a B200), about 0.5 for a CUDA context and about 1 for the
buffers of NCCL. The gaps of torch's allocator are counted separately, in `memory.py`."""


@dataclass(frozen=True)
class Hardware:
    """A device, its node and its links.

    Args:
        name: name of the device.
        peak_tflops: dense bfloat16 peak of one device, in TFLOP/s.
        memory_gib: memory of one device, in GiB, as the driver reports it.
        reserved_gib: the part of it that a run's tensors cannot use: see `RESERVED_GIB`.
        memory_gb_per_second: bandwidth of that memory, in GB/s.
        node_devices: devices per node, which share the fast links.
        node_gb_per_second: bandwidth of one device into the node's links, one direction, in GB/s.
        network_gb_per_second: bandwidth of one device into the network between nodes, one direction, in GB/s.
        matmul_efficiency: share of the peak that matrix products reach.
        attention_efficiency: share of the peak that attention reaches, together with everything else that grows with T squared.
        memory_passes: times that all other operators (norms, rotations, activations, residual sums) read or write the saved activations,
            forward and backward.
        compiled_passes: the same number with `--compile`, which joins these operators.
        link_efficiency: share of a link's bandwidth that large collectives reach.
        node_hop_microseconds: time until data reach the next rank of a ring in the same node.
        network_hop_microseconds: the same for the next rank in another node. Both are those of NCCL's own model of its rings (NVIDIA/nccl,
            src/graph/tuning.cc).
        overlap: share of the data-parallel traffic that overlaps the backward pass.
        fp32_slowdown: time of a float32 matrix product (TF32 off) relative to bfloat16.
        dollars_per_hour: price of one device.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    memory_gb_per_second: float
    node_devices: int = 8
    node_gb_per_second: float = 450.0
    network_gb_per_second: float = 50.0
    matmul_efficiency: float = 0.61
    attention_efficiency: float = 0.15
    memory_passes: float = 8.0
    compiled_passes: float = 2.0
    link_efficiency: float = 0.8
    node_hop_microseconds: float = 3.4
    network_hop_microseconds: float = 14.0
    overlap: float = 0.5
    reserved_gib: float = RESERVED_GIB
    fp32_slowdown: float = 15.0
    dollars_per_hour: float = 2.5

    @property
    def usable_gib(self) -> float:
        """Memory that is left for a run's tensors, in GiB."""
        return self.memory_gib - self.reserved_gib

    def usable_text(self) -> str:
        """Returns the usable memory as text, such as "the 77.1 GiB that are usable on one H100 of 79.6 GiB"."""
        return f"the {self.usable_gib:.1f} GiB that are usable on one {self.name} of {self.memory_gib:.1f} GiB"


def _device(
    name: str,
    mebibytes: int,
    bandwidth: float,
    node: float,
    network: float,
    dollars: float,
    matmul: float = Hardware.matmul_efficiency,
    attention: float = Hardware.attention_efficiency,
) -> Hardware:
    peak = peak_flops(name)
    assert peak is not None
    return Hardware(
        name,
        peak / 1e12,
        mebibytes / 1024,
        bandwidth,
        node_gb_per_second=node,
        network_gb_per_second=network,
        matmul_efficiency=matmul,
        attention_efficiency=attention,
        dollars_per_hour=dollars,
    )


DEVICES = {
    # Memory in MiB as `nvidia-smi` reports it, and not the nominal gigabytes of 10^9 bytes. From data sheets: the bandwidth of the memory,
    # NVLink in one direction (600, 900, 900 and 1,800 GB/s in both), and one network port per device (200, 400, 400 and 400 Gb/s).
    "A100": _device("A100", 81_920, 2039, 300, 25, 1.5, matmul=0.73, attention=0.32),
    "H100": _device("H100", 81_559, 3350, 450, 50, 2.5),
    "H200": _device("H200", 143_771, 4800, 450, 50, 3.0),
    "B200": _device("B200", 183_359, 7700, 900, 50, 5.0),
}
"""Devices by name: SXM modules in nodes of eight; the A100 is the one of 80 GB. H200 and B200 have the efficiencies of the H100, because no
published speeds suffice to fit them. Dollars per hour are round examples."""


_SHARES = ("matmul_efficiency", "attention_efficiency", "link_efficiency", "overlap")
_FROM_ZERO = ("reserved_gib", "memory_passes", "compiled_passes", "node_hop_microseconds", "network_hop_microseconds", "overlap")


def load_hardware(name: str, ceilings: Path | None = None) -> Hardware:
    """Returns a device of the table, with the user's measurements in place of the table's values.

    Args:
        name: a key of `DEVICES`; any other name needs `ceilings` with at least the fields that have no default.
        ceilings: JSON file whose keys are fields of `Hardware`, for example {"matmul_efficiency": 0.71, "dollars_per_hour": 1.9}.

    Raises:
        ConfigError: the device or a key is unknown, the file cannot be read, or a value is not a positive number.
    """
    known = next((entry for key, entry in DEVICES.items() if key.lower() == name.lower()), None)
    values: dict[str, Any] = _read(ceilings) if ceilings is not None else {}
    try:
        found = dataclasses.replace(known, **values) if known is not None else Hardware(name=name, **values)
    except TypeError:
        raise ConfigError(
            f"--gpu {name}: unknown device",
            f"{', '.join(DEVICES)}, or any name with a --ceilings file that sets peak_tflops, memory_gib and memory_gb_per_second",
            "choose a known device, or describe yours with --ceilings",
        ) from None
    if found.usable_gib <= 0:
        raise ConfigError(
            f"--ceilings {ceilings}: memory_gib is {found.memory_gib:g}, of which {found.reserved_gib:g} (reserved_gib) cannot be used",
            "a memory_gib above reserved_gib",
            "correct memory_gib or reserved_gib",
        )
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key is given twice")
    return data


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_small(path, _MOST_BYTES, wait=True), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise ConfigError(f"--ceilings {path}: {reason(error)}", "a readable JSON file", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--ceilings {path} is not valid JSON: {error}", "a JSON object", "correct the file") from error
    known = [field.name for field in dataclasses.fields(Hardware) if field.name != "name"]
    if not isinstance(data, dict):
        raise ConfigError(f"--ceilings {path} holds a {type(data).__name__}", "a JSON object", "write the values as keys of one object")
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"--ceilings {path}: unknown key {key!r}", ", ".join(known), "remove or rename the key")
        lowest = "from zero" if key in _FROM_ZERO else "above zero"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value < math.inf or (value == 0 and key in _FROM_ZERO)):
            raise ConfigError(f"--ceilings {path}: {key} is {value!r}", f"numbers {lowest}", "correct the value")
        if key in _SHARES and value > 1:
            raise ConfigError(f"--ceilings {path}: {key} is {value!r}, but it is a share", f"numbers {lowest} to 1", "give 0.71 for 71 %")
        if key == "node_devices" and not isinstance(value, int):
            raise ConfigError(f"--ceilings {path}: node_devices is {value!r}", "whole numbers from 1", "correct the value")
    return dict(data)
