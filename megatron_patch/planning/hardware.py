"""The speed of devices and links: a small table from data sheets, which a user's measurements override.

In: a device's name, optionally a JSON file of measurements. Out: `Hardware`. Peaks, memory sizes and bandwidths come from data sheets.
Efficiencies (the shares of these peaks that large matrix products, attention and links reach) are **estimates** that measurements should
replace. Prices are round examples, not offers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import peak_flops
from megatron_patch.utils.files import read_small, reason

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Hardware:
    """A device, its node and its links.

    Args:
        name: name of the device.
        peak_tflops: dense bfloat16 peak of one device, in TFLOP/s.
        memory_gib: memory of one device, in GiB.
        memory_gb_per_second: bandwidth of that memory, in GB/s.
        node_devices: devices per node, which share the fast links.
        node_gb_per_second: bandwidth of one device into the node's links, one direction, in GB/s.
        network_gb_per_second: bandwidth of one device into the network between nodes, one direction, in GB/s.
        matmul_efficiency: share of the peak that large matrix products reach.
        attention_efficiency: share of the peak that attention reaches.
        link_efficiency: share of a link's bandwidth that large collectives reach.
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
    matmul_efficiency: float = 0.65
    attention_efficiency: float = 0.45
    link_efficiency: float = 0.8
    overlap: float = 0.7
    fp32_slowdown: float = 15.0
    dollars_per_hour: float = 2.5


def _data_sheet(name: str, memory: float, bandwidth: float, node: float, network: float, dollars: float) -> Hardware:
    peak = peak_flops(name)
    assert peak is not None
    return Hardware(name, peak / 1e12, memory, bandwidth, node_gb_per_second=node, network_gb_per_second=network, dollars_per_hour=dollars)


DEVICES = {
    # Memory in GiB (data sheets count 10^9 bytes per gigabyte), its bandwidth, NVLink in one direction (600, 900, 900 and 1,800 GB/s in
    # both), and one InfiniBand port per device: HDR 200 Gb/s, NDR 400 Gb/s.
    "A100": _data_sheet("A100", 80e9 / 2**30, 2039, 300, 25, 1.5),
    "H100": _data_sheet("H100", 80e9 / 2**30, 3350, 450, 50, 2.5),
    "H200": _data_sheet("H200", 141e9 / 2**30, 4800, 450, 50, 3.0),
    "B200": _data_sheet("B200", 180e9 / 2**30, 7700, 900, 50, 5.0),
}
"""Devices by name, in nodes of eight, from the data sheets of the SXM modules. Dollars per hour are round examples."""


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
    if known is not None:
        return dataclasses.replace(known, **values)
    try:
        return Hardware(name=name, **values)
    except TypeError:
        raise ConfigError(
            f"--gpu {name}: unknown device",
            f"{', '.join(DEVICES)}, or any name with a --ceilings file that sets peak_tflops, memory_gib and memory_gb_per_second",
            "choose a known device, or describe yours with --ceilings",
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_small(path, _MOST_BYTES, wait=True))
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
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"--ceilings {path}: {key} is {value!r}", "numbers above zero", "correct the value")
        if key == "node_devices" and not isinstance(value, int):
            raise ConfigError(f"--ceilings {path}: node_devices is {value!r}", "whole numbers from 1", "correct the value")
    return dict(data)
