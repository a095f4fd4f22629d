"""Who may go on with a job that another worker began: the claim script on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.processes import on_this_machine
from tests.servers import RedisServer
from tokenfleet.wire.jobs import JobOptions, ServedModel
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Batch, Claim, Ledger, NotClaimed
from tokenfleet.wire.urls import connect_async

MODEL = "m"


class Fleet:
    """Workers that are no processes: only what they tell the ledger."""

    def __init__(self, server: RedisServer) -> None:
        self.keys = Keys(server.fleet)
        self.redis: Any = server.client()
        self.ledger = Ledger(connect_async(server.url), self.keys)

    async def worker(self, fingerprint: str, model: str = MODEL, lease_ms: int = 60_000) -> str:
        worker = new_id()
        says = ("model", model, "fingerprint", fingerprint)
        await self.ledger._run("beat", worker, lease_ms, "register", 0, *says)
        return worker

    async def job_begun_by(self, worker: str, fingerprint: str, tokens: int = 3) -> str:
        job_id, owner = new_id(), new_id()
        await self.ledger.submit(job_id, MODEL, b"{}", JobOptions(priority="interactive"))
        claim = await self.ledger.claim(job_id, worker, owner)
        assert isinstance(claim, Claim)
        fields = {"prompt": b"[1]", "fingerprint": fingerprint}
        events = [b'{"type":"delta"}']
        assert await self.ledger.append([Batch(job_id, claim.epoch, owner, 2, tokens, events, fields)]) == ["ok"]
        await self.ledger.bury(worker)
        return job_id

    def messages(self) -> int:
        return int(self.redis.llen(self.keys.queue(MODEL)))


@pytest_asyncio.fixture
async def fleet(shared_redis: RedisServer) -> AsyncIterator[Fleet]:
    fleet = Fleet(shared_redis)
    await fleet.ledger.serve(ServedModel(MODEL, "scripted", 100), new_id())
    yield fleet
    await fleet.ledger.client.aclose()
    fleet.redis.close()


async def test_another_version_leaves_what_was_begun_to_one_of_the_same(fleet: Fleet) -> None:
    right, wrong = await fleet.worker("a"), await fleet.worker("b")
    job_id = await fleet.job_begun_by(await fleet.worker("a"), "a")
    fleet.redis.delete(fleet.keys.queue(MODEL))  # the wrong one takes its message
    for _ in range(2):
        assert await fleet.ledger.claim(job_id, wrong, new_id()) == NotClaimed("elsewhere")
        assert not await fleet.ledger.hold(job_id, wrong), "nor does it wait for room here"
    status = await fleet.ledger.status(job_id)
    assert (status.state, status.worker, status.strikes) == ("queued", None, 0)
    deadline = time.monotonic() + on_this_machine(10)
    while not (await fleet.ledger.reap()).released:
        assert time.monotonic() < deadline, "its message is not sent again"
        await asyncio.sleep(0.02)
    assert fleet.messages() == 1
    claim = await fleet.ledger.claim(job_id, right, new_id())
    assert isinstance(claim, Claim)
    assert (claim.epoch, claim.tokens) == (2, 3)


@pytest.mark.parametrize("left", ["nobody", "another model's", "a dead one"])
async def test_where_no_worker_of_the_same_is_left_anyone_takes_it_and_says_so(fleet: Fleet, left: str) -> None:
    first, wrong = await fleet.worker("a"), await fleet.worker("b")
    if left == "another model's":
        await fleet.worker("a", model="other")
    elif left == "a dead one":
        await fleet.worker("a", lease_ms=-1)
    job_id = await fleet.job_begun_by(first, "a")
    assert isinstance(await fleet.ledger.claim(job_id, wrong, new_id()), Claim)


async def test_what_has_no_token_yet_is_anybodys(fleet: Fleet) -> None:
    await fleet.worker("a")
    wrong = await fleet.worker("b")
    job_id = await fleet.job_begun_by(await fleet.worker("a"), "a", tokens=0)
    assert isinstance(await fleet.ledger.claim(job_id, wrong, new_id()), Claim)
