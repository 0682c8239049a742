"""Who may run when: some workers, a queue before them, and an end for whoever takes too long or goes away."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

from qlora_runtime.server.errors import ApiError
from qlora_runtime.server.limits import Limits

T = TypeVar("T")


class Engine:
    """The workers. All but the work itself happens in the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = self.waiting = 0
        self._free = asyncio.Semaphore(limits.workers)
        self.threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="answer")
        self._usual_s = 1.0  # how long an answer took lately

    async def turn(self) -> "Turn":
        """Wait for a worker.

        Raises:
            ApiError: 429 where the queue is full, 503 where none came free in time; both say when to retry.
        """
        deadline = time.monotonic() + self.limits.timeout_s
        if self._free.locked() and self.waiting >= self.limits.queue:
            raise self._retry(429, f"{self.waiting} requests wait already.", "queue_full")
        self.waiting += 1
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise self._retry(503, "No worker came free in time.", "timeout") from None
        finally:
            self.waiting -= 1
        self.running += 1
        return Turn(self, deadline)

    def release(self, taken_s: float) -> None:
        """A worker is free again."""
        self._usual_s += (taken_s - self._usual_s) / 8
        self.running -= 1
        self._free.release()

    def _retry(self, status: int, message: str, code: str) -> ApiError:
        ahead = self.waiting + self.running
        seconds = max(1, math.ceil(self._usual_s * ahead / self.limits.workers))
        headers = {"Retry-After": str(seconds)}
        return ApiError(status, f"{message} Try again in {seconds} s.", code, headers=headers)


class Turn:
    """A worker, from the queue to the end of one answer. `close` must follow, whatever happens."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        self.cancelled = Event()  # the work looks at it and stops
        self.deadline = deadline  # of time.monotonic()
        self._engine, self._began = engine, time.monotonic()
        self._step: asyncio.Future[Any] | None = None
        self._closed = False
        self._at_end: Callable[[], None] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, in the worker's thread.

        Raises:
            ApiError: 504 where the time is up; `work` goes on alone until it sees `cancelled`.
        """
        loop = asyncio.get_running_loop()
        self._step = loop.run_in_executor(self._engine.threads, work)
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                return await asyncio.shield(self._step)  # type: ignore[no-any-return]
        except TimeoutError:
            limit = self._engine.limits.timeout_s
            raise ApiError(504, f"The answer took more than {limit} s.", "timeout") from None

    def at_end(self, free: Callable[[], None]) -> None:
        """Call `free` once no work runs any more."""
        self._at_end = free

    def close(self) -> None:
        """Tell the work to stop; the worker is free as soon as it has. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self.cancelled.set()
        if self._step is not None and not self._step.done():
            self._step.add_done_callback(self._release)
        else:
            self._release(None)

    def _release(self, step: "asyncio.Future[Any] | None") -> None:
        if step is not None and not step.cancelled():
            step.exception()  # seen: nobody waits for it any more
        if self._at_end is not None:
            self._at_end()
        self._engine.release(time.monotonic() - self._began)


async def steps(turn: Turn, source: Iterator[T]) -> AsyncIterator[T]:
    """The items of `source`, each made in the worker's thread."""
    work: Callable[[], T | None] = lambda: next(source, None)  # noqa: E731
    while (item := await turn.run(work)) is not None:
        yield item
