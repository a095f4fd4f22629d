"""The collector's promises to those who leave."""

from __future__ import annotations

import asyncio

import pytest

from tests.fleets import MODEL, Fleet
from tokenfleet import AsyncClient
from tokenfleet.producer.collector import Collector
from tokenfleet.wire import urls
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Ledger


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
            done, _ = await asyncio.wait([task], timeout=30)
            assert done, f"a reader cancelled after {turns} turns goes on"
            assert task.cancelled()


async def test_many_readers_that_begin_at_once_share_one_subscription(served: Fleet) -> None:
    """Also while their channels are cut: connections that nobody gives back would drain the pool in the end."""
    connection = urls.connect_async(served.redis.url)
    collector = Collector(Ledger(connection, Keys(served.redis.fleet)))

    async def read() -> None:
        async with collector.follow(new_id()):
            await asyncio.sleep(0.05)

    with served.redis.client() as killer:
        for is_cut in (False, True, True):
            reading = asyncio.gather(*(read() for _ in range(30)))
            await asyncio.sleep(0.01)
            if is_cut:
                killer.client_kill_filter(_type="pubsub")
            await reading
            kept = len(connection.connection_pool._in_use_connections)
            assert kept <= 1, f"{kept} connections are held for one subscription"
    await collector.close()
    await connection.aclose()
