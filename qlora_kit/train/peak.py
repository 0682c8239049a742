"""How much memory a run really takes: the most that it holds beyond what its libraries did before it began."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

import psutil
import torch

from qlora_kit.plan import format_bytes
from qlora_kit.train.memory_limit import anonymous_bytes

INTERVAL_S = 0.005
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TIGHT_BYTES = -3, -1, 2**17  # malloc.h of glibc


class PeakWatch:
    """Looks at this process' anonymous memory every few milliseconds from `with` until `stop` or its end.

    On a GPU torch itself keeps the peak of what it reserved. `planned_bytes` is what the plan says of this run.
    """

    def __init__(self, planned_bytes: int | None = None) -> None:
        self.planned_bytes = planned_bytes
        self._first = self._highest = anonymous_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def peak_bytes(self) -> int:
        """The most so far, above what was there at the beginning; on a GPU the most that torch reserved."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_reserved()
        return self._highest - self._first

    def compared(self) -> str | None:
        """Planned and measured in a sentence; None without a plan."""
        planned, measured = self.planned_bytes, self.peak_bytes
        if planned is None or not measured:
            return None
        difference = 100 * (planned / measured - 1)
        return f"memory: planned {format_bytes(planned)}, measured {format_bytes(measured)} ({difference:+.1f}%)"

    def stop(self) -> None:
        """What comes after does not count."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _look(self) -> None:
        while not self._stopped.is_set():
            self._highest = max(self._highest, anonymous_bytes())
            time.sleep(INTERVAL_S)


def use_allocator(kind: str) -> None:
    """Sets how malloc keeps what is freed, for this process: `fast` as the system does, `tight` gives it back at once.

    Tight, each tensor of 128 KiB or more has pages of its own, which go back when it is freed: no holes between tensors
    that live on. The price is that pages are cleared anew. Only glibc can be told; elsewhere nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if psutil.LINUX else None
    if kind == "tight" and set_option is not None:
        set_option(_MMAP_THRESHOLD, _TIGHT_BYTES)
        set_option(_TRIM_THRESHOLD, _TIGHT_BYTES)
