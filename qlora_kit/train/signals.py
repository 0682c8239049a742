"""Ctrl-C and SIGTERM: the first ends the run after the step at hand, a second Ctrl-C at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO_S = 1.0  # launchers pass on a Ctrl-C that the terminal has sent already


class StopSignals:
    """Remembers signals. `at_once` makes the next one raise KeyboardInterrupt instead of waiting for a step's end."""

    def __init__(self) -> None:
        self.received: dict[int, float] = {}
        self.at_once = False

    @property
    def wanted(self) -> bool:
        return bool(self.received)

    def __call__(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        first = self.received.setdefault(number, now)
        if self.at_once or now - first > ECHO_S:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Catches SIGINT and SIGTERM for the time of the block; only the main thread can, elsewhere nothing is caught."""
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
