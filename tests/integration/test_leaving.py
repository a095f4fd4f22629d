"""Whoever is interrupted, cancelled or closed between any two steps leaves nothing behind: no job, no subscription."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.fleets import MODEL, Fleet
from tests.jobs import Jobs
from tests.processes import on_this_machine
from tests.servers import RedisServer
from tokenfleet import AsyncClient, ChatModel
from tokenfleet.producer.gateway.app import create_app
from tokenfleet.producer.gateway.batch_rows import call
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire import urls
from tokenfleet.wire.errors import FleetUnavailable, InvalidRequest, Overloaded
from tokenfleet.wire.events import Queued
from tokenfleet.wire.keys import new_id
from tokenfleet.workers.runtime import Runtime
from tokenfleet.workers.served import Served
from tokenfleet.workers.settings import WorkerSettings

LONG = {"max_new_tokens": 30_000}


@pytest.fixture
async def client(served: Fleet) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.redis.url, fleet=served.redis.fleet, model=MODEL) as client:
        await client.chat("count", max_new_tokens=2)  # warm
        yield client


@pytest.fixture(scope="module")
def model(served: Fleet) -> Iterator[ChatModel]:
    with ChatModel({"redis_url": served.redis.url, "fleet": served.redis.fleet, "model": MODEL}) as model:
        model.chat("count", max_new_tokens=2)
        yield model


async def cancelled_after(turns: int, coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run it for so many turns of the loop."""
    task = asyncio.create_task(coroutine)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def test_a_reader_cancelled_while_it_begins_stays_subscribed_to_nothing(client: AsyncClient) -> None:
    collector = await client._collector()

    async def follow() -> None:
        async with collector.follow(new_id()):
            await asyncio.Event().wait()

    for turns in range(40):
        await cancelled_after(turns, follow())
        assert not collector._followers, f"cancelled after {turns} turns"
    async with asyncio.timeout(on_this_machine(20)):
        while collector._pubsub.channels:
            await asyncio.sleep(0.01)


async def test_a_stream_whose_first_reading_was_cancelled_is_read_from_its_start(client: AsyncClient) -> None:
    """As `asyncio.wait_for` does when its time is over: it must not look as if the job had ended without an event."""
    job = await client.submit("count", max_new_tokens=2)
    for turns in range(12):
        stream = job.stream()
        await cancelled_after(turns, anext(stream))
        if stream.cursor == 0:
            assert isinstance(await anext(stream), Queued), f"cancelled after {turns} turns"
        await stream.aclose()


async def test_whoever_reads_while_the_client_is_closed_is_told_so(served: Fleet) -> None:
    client = AsyncClient(served.redis.url, fleet=served.redis.fleet, model=MODEL)
    job = await client.submit("count", **LONG, cancel_on_disconnect=True)
    stream = job.stream()
    await anext(stream)
    reading = [asyncio.create_task(job.result()), asyncio.create_task(read_on(stream))]
    await asyncio.sleep(0.1)
    await client.aclose()
    done, _ = await asyncio.wait(reading, timeout=on_this_machine(20))
    assert [str(task.exception()) for task in done] == ["This client is closed."] * 2
    with served.client() as other:
        assert other.job(job.id).status().state == "cancelled"


async def read_on(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            pass


async def test_of_many_of_which_one_is_refused_none_runs_but_those_with_a_name_of_the_callers(
    client: AsyncClient, served: Fleet
) -> None:
    jobs, name = Jobs(served), new_id()
    client._max_queued = 3
    with served.workers[0].frozen(), pytest.raises(Overloaded):
        await client.submit_many([{"messages": "count", "job_id": name}, *["count"] * 80], **LONG)
    await client.job(name).cancel()
    jobs.all_end_cancelled(2)
    with pytest.raises(InvalidRequest):
        await client.submit_many(["count", ""], temperature=-1.0)


@pytest.mark.parametrize("call", ["chat", "achat", "astream_chat"])
async def test_a_call_cancelled_at_any_moment_leaves_no_job(call: str, model: ChatModel, served: Fleet) -> None:
    """Nobody else knows of it."""

    async def use() -> None:
        if call == "chat":
            await model.client.thread.arun(model.client.aio.chat("count", **LONG))
        elif call == "achat":
            await model.achat("count", **LONG)
        else:
            async for _ in model.astream_chat("count", **LONG):
                pass

    jobs = Jobs(served)
    for k in range(40):
        task, until = asyncio.create_task(use()), time.perf_counter() + k * 0.0003
        while time.perf_counter() < until:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await asyncio.to_thread(jobs.all_end_cancelled, 5)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # interrupted just before
def test_a_call_interrupted_at_any_moment_leaves_no_job(model: ChatModel, served: Fleet) -> None:
    """By Ctrl-C, that is: also as the loop's thread is told of the call."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, main = signal.signal(signal.SIGUSR1, interrupt), threading.get_ident()
    jobs = Jobs(served)
    try:
        for k in range(60):
            timer = threading.Timer(k * 0.0002, signal.pthread_kill, (main, signal.SIGUSR1))
            with contextlib.suppress(KeyboardInterrupt):
                timer.start()
                model.chat("count", **LONG)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    jobs.all_end_cancelled(5)


@pytest.mark.parametrize(("call", "at"), [("submit", 1), ("submit", 2), ("submit_many", 1), ("stream_chat", 1)])
def test_a_call_interrupted_just_as_a_step_is_done_leaves_no_job(
    call: str, at: int, model: ChatModel, served: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's result had come, and nobody got it."""
    thread, steps = model.client.thread, itertools.count(1)
    run = thread.run

    def interrupted(coroutine: Coroutine[Any, Any, Any]) -> Any:
        result = run(coroutine)
        if next(steps) == at:
            raise KeyboardInterrupt
        return result

    def use() -> None:
        if call == "submit":
            list(model.client.submit("count", **LONG, cancel_on_disconnect=True).text())
        elif call == "submit_many":
            model.client.submit_many(["count"], **LONG)
        else:
            list(model.stream_chat("count", **LONG))

    jobs = Jobs(served)
    monkeypatch.setattr(thread, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        use()
    monkeypatch.undo()
    jobs.all_end_cancelled(1)


async def test_readers_of_a_collector_that_meets_a_bug_are_told_and_the_next_ones_served(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = await client._collector()
    with monkeypatch.context() as broken:
        broken.setattr(collector, "_dispatch", lambda *_: 1 / 0)
        async with asyncio.timeout(on_this_machine(20)):
            with pytest.raises(RuntimeError, match="ZeroDivisionError"):
                await client.chat("count", **LONG)
    assert (await client.chat("count", max_new_tokens=2)).usage.completion_tokens == 2


def runtime_on(redis: RedisServer, told: asyncio.Event) -> Runtime:
    """A worker without Celery. ``told``: its engine is taken for dead."""
    settings = WorkerSettings(redis_url=redis.url, fleet=redis.fleet, model=MODEL, engine="scripted", engine_args={})
    return Runtime(
        settings, Served(settings), lambda: urls.connect_async(redis.url), lambda: urls.connect(redis.url),
        lambda reason: told.set(), lambda is_busy: None, lambda job_id: None,
    )  # fmt: skip


async def test_a_worker_whose_publisher_meets_a_bug_leaves(shared_redis: RedisServer) -> None:
    """It would keep its lease, and its jobs, and get nowhere."""
    runtime = runtime_on(shared_redis, told := asyncio.Event())
    async with runtime.open():
        runtime.publisher._send_one_batch = lambda: 1 / 0  # type: ignore[assignment,method-assign,return-value]
        runtime.publisher.mark(None)  # type: ignore[arg-type]
        async with asyncio.timeout(on_this_machine(20)):
            await told.wait()
        assert runtime.is_draining


async def test_a_job_whose_claim_is_cut_off_by_a_cold_shutdown_is_not_struck(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, is_claimed = runtime_on(shared_redis, asyncio.Event()), asyncio.Event()
    claim = runtime.ledger.claim

    async def unanswered(*args: str) -> Any:
        await claim(*args)
        is_claimed.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(runtime.ledger, "claim", unanswered)
    async with AsyncClient(shared_redis.url, fleet=shared_redis.fleet, model=MODEL) as client:
        async with runtime.open():
            job = await client.submit("count")
            running = asyncio.create_task(runtime.run_job(job.id))
            await is_claimed.wait()
            running.cancel()
            await asyncio.wait([running])
        status = await job.status()
        assert (status.state, status.attempts, status.strikes) == ("queued", 1, 0)


async def test_a_background_response_whose_log_can_not_be_read_is_told_of(served: Fleet, tmp_path: Path) -> None:
    """It is queued: without its id nobody could look for it, or end it."""
    app = create_app(GatewaySettings(redis_url=served.redis.url, fleet=served.redis.fleet, storage=str(tmp_path)))
    async with app.router.lifespan_context(app):
        client = app.state.client

        async def away(*_: object) -> None:
            raise FleetUnavailable("Redis is away.")

        client.events = away
        body = msgspec.json.encode({"model": MODEL, "input": "count", "background": True})
        status, answer, _ = await call(app, "/v1/responses", "", "a key", body)
        told = msgspec.json.decode(answer)
        assert (status, told["status"]) == (200, "queued")
        assert abs(told["created_at"] - time.time()) < on_this_machine(20)
        assert (await client.job(str(UUID(told["id"].removeprefix("resp_")))).status()).events
