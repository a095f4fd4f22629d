"""The collector's promises to those who leave."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tests.fleets import MODEL, Fleet
from tests.processes import on_this_machine
from tests.servers import RedisServer
from tokenfleet import AsyncClient
from tokenfleet.producer.collector import Collector
from tokenfleet.wire import urls
from tokenfleet.wire.errors import UnknownJob
from tokenfleet.wire.events import Started, encode
from tokenfleet.wire.jobs import JobOptions, ServedModel
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Batch, Claim, Ledger, Polled


@pytest.mark.timeout(120)
async def test_who_is_cancelled_at_any_moment_stops_and_leaves_no_job(served: Fleet) -> None:
    """Also at the very moment when its subscription is confirmed: a reader that goes on would hold its task group.
    Also while its job is queued, and before its stream has begun: nobody else would end that job."""
    async with AsyncClient(served.redis.url, fleet=served.redis.fleet, model=MODEL) as client:
        warm = await client.submit("count", max_new_tokens=2)
        await warm.result(20)

        async def read(job_id: str) -> None:
            job = await client.submit("count", job_id=job_id, max_new_tokens=30_000, cancel_on_disconnect=True)
            async with job.stream() as stream:
                async for _ in stream:
                    pass

        ends: Counter[str] = Counter()
        for turns in range(150):
            task = asyncio.create_task(read(job_id := new_id()))
            for _ in range(turns):  # so many turns of the loop after its start
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=30)
            assert done, f"a reader cancelled after {turns} turns goes on"
            assert task.cancelled()
            try:
                ends[(await client.job(job_id).status()).state] += 1
            except UnknownJob:
                ends["never queued"] += 1
        assert ends["cancelled"] > 100, ends
        assert ends.keys() <= {"never queued", "cancelled"}, ends


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


class SlowToAnswer(Ledger):
    """Its answers to `poll` come when the test lets them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.has_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def poll(self, job_ids: Sequence[str]) -> list[Polled | None]:
        polled = await super().poll(job_ids)
        self.has_asked.set()
        await self.may_answer.wait()
        return polled


async def test_what_is_read_while_the_ledger_answers_is_no_loss(shared_redis: RedisServer) -> None:
    """The answer is older than the event that came meanwhile, on another connection."""
    connection = urls.connect_async(shared_redis.url)
    ledger = SlowToAnswer(connection, Keys(shared_redis.fleet))
    worker, job_id, owner = new_id(), new_id(), new_id()
    await ledger.serve(ServedModel("m", "scripted", 100), new_id())
    await ledger._run("beat", worker, 60_000, "register", 0)
    await ledger.submit(job_id, "m", b"{}", JobOptions())
    assert isinstance(claim := await ledger.claim(job_id, worker, owner), Claim)

    async def write(seq: int) -> None:
        event = encode(Started(seq, worker, 1))
        assert await ledger.append([Batch(job_id, claim.epoch, owner, seq, 0, [event])]) == ["ok"]

    collector = Collector(ledger)
    async with asyncio.timeout(on_this_machine(20)), collector.follow(job_id) as follower:
        assert [seq for seq, _ in await follower.next_batch()] == [1]
        await ledger.has_asked.wait()  # silent for a second
        await write(2)
        assert [seq for seq, _ in await follower.next_batch()] == [2]
        ledger.may_answer.set()
        await asyncio.sleep(0)
        for seq in (3, 4):
            reading = asyncio.create_task(follower.next_batch())
            await write(seq)
            assert [each for each, _ in await reading] == [seq]
    await collector.close()
    await connection.aclose()
