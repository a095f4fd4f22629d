"""The collector's promises to those who leave."""

from __future__ import annotations

import asyncio

import pytest

from tests.fleets import MODEL, Fleet
from tokenfleet import AsyncClient


@pytest.mark.timeout(120)
async def test_a_reader_that_is_cancelled_at_any_moment_stops(served: Fleet) -> None:
    """Also at the very moment when its subscription is confirmed: a reader that goes on would hold its task group."""
    async with AsyncClient(served.redis.url, fleet=served.redis.fleet, model=MODEL) as client:
        warm = await client.submit("count", max_new_tokens=2)
        await warm.result(20)

        async def read() -> None:
            job = await client.submit("count", max_new_tokens=2_000, cancel_on_disconnect=True)
            async with job.stream() as stream:
                async for _ in stream:
                    pass

        for turns in range(150):
            task = asyncio.create_task(read())
            for _ in range(turns):  # so many turns of the loop after its start
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=5)
            assert done, f"a reader cancelled after {turns} turns goes on"
            assert task.cancelled()
