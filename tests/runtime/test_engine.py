"""Turns at the workers: who waits, who is sent away, and that a worker is free only when its work has ended."""

import asyncio
import threading

import pytest
from qlora_runtime.server.engine import Engine, steps
from qlora_runtime.server.errors import ApiError
from qlora_runtime.server.limits import Limits


def with_engine(test, **limits):
    async def run():
        engine = Engine(Limits(**limits))
        try:
            return await test(engine)
        finally:
            await asyncio.to_thread(engine.threads.shutdown)

    return asyncio.run(run())


def test_work_that_is_broken_off_stops_and_only_then_frees_its_worker():
    async def test(engine):
        turn = await engine.turn()
        stopping, freed = threading.Event(), []

        def work():
            assert turn.cancelled.wait(10)
            assert stopping.wait(10)

        turn.at_end(lambda: freed.append(engine.running))
        running = asyncio.ensure_future(turn.run(work))
        await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        turn.close()
        turn.close()
        waiting = asyncio.ensure_future(engine.turn())
        await asyncio.sleep(0.05)
        assert not waiting.done() and (engine.running, engine.waiting) == (1, 1)
        stopping.set()
        (await waiting).close()
        assert freed == [1]
        assert (engine.running, engine.waiting) == (0, 0)

    with_engine(test)


def test_a_full_queue_and_a_long_wait_are_refused():
    async def test(engine):
        turn = await engine.turn()
        waiting = asyncio.ensure_future(engine.turn())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="1 requests wait already") as full:
            await engine.turn()
        with pytest.raises(ApiError, match="No worker came free in time") as late:
            await waiting
        turn.close()
        assert (full.value.status, late.value.status) == (429, 503)
        assert int(full.value.headers["Retry-After"]) >= 1
        assert (engine.running, engine.waiting) == (0, 0)

    with_engine(test, queue=1, timeout_s=1)


def test_one_who_goes_away_leaves_the_queue():
    async def test(engine):
        turn = await engine.turn()
        gone = asyncio.ensure_future(engine.turn())
        await asyncio.sleep(0)
        assert engine.waiting == 1
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert engine.waiting == 0
        turn.close()
        (await engine.turn()).close()

    with_engine(test)


def test_work_that_takes_too_long_is_refused_and_told_to_stop():
    async def test(engine):
        turn = await engine.turn()
        with pytest.raises(ApiError, match="took more than 1 s") as late:
            await turn.run(lambda: turn.cancelled.wait(10))
        assert late.value.status == 504
        turn.close()
        (await engine.turn()).close()

    with_engine(test, timeout_s=1)


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_are_made_in_the_workers_threads(workers):
    async def test(engine):
        async def items(number):
            turn = await engine.turn()
            found = [item async for item in steps(turn, ((number, place) for place in range(20)))]
            turn.close()
            return found

        everything = await asyncio.gather(*(items(number) for number in range(7)))
        assert everything == [[(number, place) for place in range(20)] for number in range(7)]
        assert engine.running == 0

    with_engine(test, workers=workers)


def test_what_the_work_raises_comes_out():
    async def test(engine):
        turn = await engine.turn()
        with pytest.raises(ZeroDivisionError):
            await turn.run(lambda: 1 // 0)
        turn.close()
        assert engine.running == 0

    with_engine(test)
