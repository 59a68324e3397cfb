"""Detects a GPU through the driver, without importing torch, which takes seconds."""

from __future__ import annotations

import ctypes


def has_gpu() -> bool:
    """Returns whether the driver is installed and offers a GPU to this process."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
