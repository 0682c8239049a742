"""What this machine has: read from the operating system and the installed packages, without opening a socket.

Nothing here judges; `qlora_kit.doctor.judge` does. torch is imported for the graphics cards only, and bitsandbytes
not at all: where the package `kernels` is installed, its import would fetch a binary from a hub.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

import psutil

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "neon", "bf16")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability, for example (7, 5) for Turing and (8, 6) for Ampere laptop cards."""


@dataclass(frozen=True)
class Machine:
    """Facts, nothing judged. A library that is not installed has version None."""

    system: str
    """Linux, WSL, macOS or Windows."""
    release: str
    architecture: str
    python: str
    python_range: str
    """What the installed package supports, for example `>=3.11,<3.13`; empty where unknown."""
    libraries: dict[str, str | None]
    library_ranges: dict[str, str]
    cpu: str
    cores: int
    """Physical cores this process may use."""
    cpu_flags: list[str]
    """Those of `CPU_FLAGS` that the processor has."""
    memory_bytes: int
    """All memory, or a container's limit where that is lower."""
    free_memory_bytes: int
    free_disk_bytes: int
    gpus: list[Gpu] = field(default_factory=list)
    torch_cuda: str | None = None
    """CUDA version torch was built for; None for a CPU build or without torch."""
    nvidia_driver: bool = False
    bitsandbytes_backends: list[str] = field(default_factory=list)
    """Its native libraries, for example cpu, cuda126."""
    offline: list[str] = field(default_factory=list)
    """Environment variables that switch the hub off."""


def probe(folder: Path | None = None) -> Machine:
    """Reads this machine. `folder` is where disk space counts; the current folder when left out."""
    python_range, ranges = read_ranges("qlora-kit")
    name, flags = _cpu()
    gpus, torch_cuda = _gpus()
    memory, free = _memory()
    return Machine(
        system=system_name(platform.system(), platform.release()),
        release=platform.release(),
        architecture=platform.machine(),
        python=platform.python_version(),
        python_range=python_range,
        libraries={library: _version(library) for library in ranges},
        library_ranges=ranges,
        cpu=name,
        cores=_cores(),
        cpu_flags=flags,
        memory_bytes=memory,
        free_memory_bytes=free,
        free_disk_bytes=psutil.disk_usage(str(folder or Path.cwd())).free,
        gpus=gpus,
        torch_cuda=torch_cuda,
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        bitsandbytes_backends=_bitsandbytes_backends(),
        offline=offline_variables(os.environ),
    )


def system_name(system: str, release: str) -> str:
    """`platform.system()` in the words people use; Linux below Windows is WSL."""
    if system == "Linux" and "microsoft" in release.lower():
        return "WSL"
    return {"Darwin": "macOS"}.get(system, system)


def offline_variables(environment: Mapping[str, str]) -> list[str]:
    """Which of the hub's switches are set to on."""
    return [name for name in OFFLINE_VARIABLES if environment.get(name, "").upper() in _TRUE]


def read_ranges(distribution: str) -> tuple[str, dict[str, str]]:
    """(Python range, library to range) from an installed package's metadata, extras aside; empty if not installed."""
    from packaging.requirements import Requirement

    try:
        found = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return "", {}
    requirements = [Requirement(line) for line in found.get_all("Requires-Dist") or []]
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    return "".join(found.get_all("Requires-Python") or []), {item.name: str(item.specifier) for item in needed}


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """(name, flags of interest) from the text of Linux's /proc/cpuinfo, x86 (`flags`) or ARM (`Features`)."""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    present |= {"neon"} if "asimd" in present else set()
    return fields.get("model name", ""), [flag for flag in CPU_FLAGS if flag in present]


def capability_flags(capability: str) -> list[str]:
    """Flags from torch's name for the processor (`AVX2`, `AVX512`), for systems without /proc."""
    return {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"]}.get(capability, [])


def _cpu() -> tuple[str, list[str]]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name, flags = parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
        return name or platform.processor() or platform.machine(), flags
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        name = asked.stdout.strip() or name
    if platform.machine().lower() in ("arm64", "aarch64"):
        return name, ["neon"]
    try:
        import torch
    except (ImportError, OSError):
        return name, []
    return name, capability_flags(torch.backends.cpu.get_cpu_capability())


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _memory() -> tuple[int, int]:
    """(total, available) in bytes; a container's limit counts where Linux sets one (cgroup v2)."""
    memory = psutil.virtual_memory()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        allowed = int(limit.read_text())
        return min(memory.total, allowed), max(0, min(memory.available, allowed - int(used.read_text())))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return memory.total, memory.available


def _gpus() -> tuple[list[Gpu], str | None]:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a CUDA library that torch needs is missing
        return [], None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [Gpu(item.name, item.total_memory, (item.major, item.minor)) for item in properties], torch.version.cuda


def _bitsandbytes_backends() -> list[str]:
    """Suffixes of the native libraries in the installed package, found without importing it."""
    spec = util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return []
    libraries = Path(spec.origin).parent.glob("libbitsandbytes_*")
    return sorted({path.name.split(".")[0].removeprefix("libbitsandbytes_") for path in libraries})


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
