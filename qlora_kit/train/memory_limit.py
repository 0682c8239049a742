"""How much memory training holds, and the limit that a recipe may set (`train.memory_limit`)."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from typing import Any

import psutil
import torch


class LimitPassed(MemoryError):
    """More memory is held than `train.memory_limit` allows."""


@dataclass(frozen=True)
class MemoryLimit:
    """At most `limit_bytes` on `device`, of any number where None.

    Counted is what a program cannot share or give back: this process' anonymous memory on a CPU, the memory that torch
    has reserved on a GPU.
    """

    device: torch.device
    limit_bytes: int | None = None

    def check(self) -> None:
        """Raises LimitPassed where more is held, after what is free has been given back."""
        if self.limit_bytes is None or self.held_bytes() <= self.limit_bytes:
            return
        if self.device.type == "cpu":  # on a GPU what is reserved tells the peak
            give_back()
        held = self.held_bytes()
        if held > self.limit_bytes:
            allowed = f"train.memory_limit of {self.limit_bytes / 2**30:.2f} GiB"
            raise LimitPassed(f"{held / 2**30:.2f} GiB in use, over the {allowed}")

    def held_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return anonymous_bytes()


def anonymous_bytes(process: psutil.Process | None = None) -> int:
    """Resident memory of a process (None: this one) that no file backs; all of it where the system does not tell."""
    memory: Any = (process or psutil.Process()).memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def give_back() -> None:
    """Returns free memory that this process still holds, to the system or to the GPU."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if psutil.LINUX else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
