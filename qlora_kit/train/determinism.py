"""Same seed, same bits: threads, algorithms and random generators of a run."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch


def make_deterministic(device: torch.device, threads: int | None) -> int:
    """Fixes the thread count and torch's algorithms. Returns the CPU threads in use.

    On a CPU an operation without a deterministic form is an error; on CUDA (where some attention backward
    passes have none) a warning, and equal bits are not promised.
    """
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    return torch.get_num_threads()


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and a place in it, for example (42, "step", 7, "micro", 0, "rank", 1)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
