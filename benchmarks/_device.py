"""Whether there is a GPU, asked of the driver: without torch, whose import takes seconds."""

from __future__ import annotations

import ctypes


def has_gpu() -> bool:
    """Whether the driver is installed and has a GPU for this process."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
