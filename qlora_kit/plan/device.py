"""Where this machine would train, asked of the driver: importing torch for it would take seconds."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata

from qlora_kit.plan.memory import Device

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def device_here() -> Device:
    """`cuda` where there is a card and torch is no CPU build, as far as the name of its version tells."""
    return "cuda" if not _cpu_build() and cuda_devices() else "cpu"


def cuda_devices() -> int:
    """CUDA devices that NVIDIA's driver shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _cpu_build() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
