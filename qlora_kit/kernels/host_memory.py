"""Memory of the host that a device copies from and to."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.errors import OutOfMemory


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, pin: bool, fix: str) -> Tensor:
    """Uninitialized, on the host; pinned, it is copied without waiting.

    Args:
        fix: what to change where it cannot be had.

    Raises:
        OutOfMemory: the system gives no more, or pins no more.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    except RuntimeError as error:
        line = (str(error).splitlines() or [""])[0]
        size = torch.Size(shape).numel() * dtype.itemsize
        what = f"the host gives no {size / 2**20:.1f} MiB of {'pinned ' if pin else ''}memory"
        raise OutOfMemory(f"{what}: {line}", fix=f"Free some of it, or {fix}") from error
