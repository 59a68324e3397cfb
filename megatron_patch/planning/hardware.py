"""What devices and links can do: a small table from data sheets, and the user's own measured ceilings in its place.

In: a device's name, a JSON file of the user. Out: `Hardware`. Peaks, memory and bandwidths are the makers' data sheets'; efficiencies
(what large matrix products, attention and links reach of their peaks) are **estimates**, which measurements should replace; prices are
round examples, not offers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import peak_flops


@dataclass(frozen=True)
class Hardware:
    """A device, its node, its links.

    Args:
        name: of the device.
        peak_tflops: dense bfloat16 peak of a device.
        memory_gib: of a device.
        memory_gb_per_second: bandwidth of that memory.
        node_devices: devices that share the fast links.
        node_gb_per_second: of a device into these links, one direction.
        network_gb_per_second: of a device into the network between nodes, one direction.
        matmul_efficiency: share of the peak that large matrix products reach.
        attention_efficiency: the same of attention.
        link_efficiency: share of a link's rate that large collectives reach.
        overlap: share of data-parallel traffic that hides behind the backward pass.
        fp32_slowdown: how many times slower products in float32 (TF32 off) are.
        dollars_per_hour: of one device.
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


def _of_table(name: str, memory: float, bandwidth: float, node: float, network: float, dollars: float) -> Hardware:
    peak = peak_flops(name)
    assert peak is not None
    return Hardware(name, peak / 1e12, memory, bandwidth, node_gb_per_second=node, network_gb_per_second=network, dollars_per_hour=dollars)


TABLE = {
    # Memory in GiB (the maker's gigabytes are 10^9 bytes), its bandwidth, NVLink one way (600, 900, 900, 1,800 GB/s both ways), and one
    # InfiniBand port a device: HDR 200 Gb/s, NDR 400 Gb/s.
    "A100": _of_table("A100", 80e9 / 2**30, 2039, 300, 25, 1.5),
    "H100": _of_table("H100", 80e9 / 2**30, 3350, 450, 50, 2.5),
    "H200": _of_table("H200", 141e9 / 2**30, 4800, 450, 50, 3.0),
    "B200": _of_table("B200", 180e9 / 2**30, 7700, 900, 50, 5.0),
}
"""Devices by name, in nodes of eight: data sheets for the SXM forms; dollars an hour are round examples."""


def hardware(name: str, ceilings: Path | None = None) -> Hardware:
    """A device of the table, with the user's figures in the place of the table's.

    Args:
        name: a key of `TABLE`, or with `ceilings` that give everything any name.
        ceilings: a JSON object whose keys are fields of `Hardware`, for example {"matmul_efficiency": 0.71, "dollars_per_hour": 1.9}.

    Raises:
        ConfigError: an unknown device, an unreadable file, an unknown key, a value that is no number above zero.
    """
    known = next((entry for key, entry in TABLE.items() if key.lower() == name.lower()), None)
    values: dict[str, Any] = _read(ceilings) if ceilings is not None else {}
    if known is not None:
        return dataclasses.replace(known, **values)
    try:
        return Hardware(name=name, **values)
    except TypeError:
        raise ConfigError(
            f"--gpu {name}",
            f"{', '.join(TABLE)}, or any name with --ceilings that give peak_tflops, memory_gib and memory_gb_per_second",
            "choose one, or measure yours",
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ceilings {path}: {error.strerror}", "a readable JSON file", "check the path") from error
    except ValueError as error:
        raise ConfigError(f"--ceilings {path} is not valid JSON: {error}", "a JSON object") from error
    known = [field.name for field in dataclasses.fields(Hardware) if field.name != "name"]
    if not isinstance(data, dict):
        raise ConfigError(f"--ceilings {path} holds a {type(data).__name__}", "a JSON object")
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"--ceilings {path}: unknown key {key!r}", ", ".join(known), "remove it")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"--ceilings {path}: {key} is {value!r}", "numbers above zero")
        if key == "node_devices" and not isinstance(value, int):
            raise ConfigError(f"--ceilings {path}: node_devices is {value!r}", "whole numbers from 1")
    return dict(data)
