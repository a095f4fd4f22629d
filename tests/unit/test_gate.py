"""Who may use the engine beside whom."""

from __future__ import annotations

import asyncio

from tokenfleet.workers.gate import Gate


async def turns() -> None:
    """More than any of these needs to come as far as it may."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_that_is_alone_waits_for_the_others_and_keeps_later_ones_out() -> None:
    gate, order = Gate(), []
    leave, proven = asyncio.Event(), asyncio.Event()

    async def shared(name: str) -> None:
        async with gate.shared():
            order.append(name)
            if name == "early":
                await leave.wait()

    async def alone() -> None:
        async with gate.alone() as share:
            order.append("alone")
            await proven.wait()
            order.append("harmless")
            share()
            share()  # does nothing the second time
            await turns()
            order.append("over")

    tasks = []
    for work in (shared("early"), alone(), shared("late")):
        tasks.append(asyncio.create_task(work))
        await asyncio.sleep(0)
    await turns()
    assert order == ["early"]
    leave.set()
    await turns()
    assert order == ["early", "alone"]
    proven.set()
    await asyncio.gather(*tasks)
    assert order == ["early", "alone", "harmless", "late", "over"]


async def test_a_cancelled_wait_leaves_the_gate_open() -> None:
    gate, leave = Gate(), asyncio.Event()

    async def stay() -> None:
        async with gate.shared():
            await leave.wait()

    async def alone() -> None:
        async with gate.alone():
            pass

    first = asyncio.create_task(stay())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(alone())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(20), gate.shared():
        leave.set()
    await first
    async with asyncio.timeout(20), gate.alone():
        pass
