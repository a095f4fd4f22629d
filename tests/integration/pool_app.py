"""The Celery app that the workers of test_pool.py run: ``celery -A tests.integration.pool_app worker``.

It says what it does in a Redis list (``said``), so that a test can wait for it, and waits at gates that a test opens.
``POOL_TEST`` in the environment is a JSON object: ``redis`` (redis-py's URL), ``broker`` (Celery's), ``conf`` (Celery's
settings), ``start`` (what the lifespan does).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator

import redis
import redis.asyncio
from celery import Celery, current_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import worker_ready

from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.workers.pool import AsyncioPool, AsyncTask, register_lifespan

SETUP = json.loads(os.environ["POOL_TEST"])

app = Celery("pool_test", broker=SETUP["broker"], backend=SETUP["broker"])
app.conf.update(
    worker_pool="tests.integration.pool_app:ImpatientPool",
    task_acks_late=True,
    task_default_queue="work",
    worker_prefetch_multiplier=4,  # Celery's default: the pool has to hold no more than its slots all the same
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    **SETUP.get("conf", {}),
)
client = redis.Redis.from_url(SETUP["redis"], decode_responses=True)


class ImpatientPool(AsyncioPool):
    exit_s = 3.0
    cancel_grace_s = 0.5
    cold_closing_s = 0.5


def say(*words: object) -> None:
    client.rpush("said", " ".join(map(str, words)))


@worker_ready.connect
def _ready(**_: object) -> None:
    say("ready")


@register_lifespan
@contextlib.asynccontextmanager
async def outer() -> AsyncIterator[None]:
    pool = AsyncioPool.current()
    assert asyncio.get_running_loop() is pool.loop
    pool.on_child_quit(lambda pid: say("child quit"))
    match SETUP.get("start"):
        case "refuse":
            raise ConfigurationError("There is no model.", hint="Name one.")
        case "break":
            raise ZeroDivisionError("first line\nsecond line")
        case "hang":
            say("starting")
            try:
                await asyncio.sleep(3600)
            finally:
                say("start cancelled")
        case "load in a thread":
            say("starting")
            await asyncio.to_thread(blocking_gate, "never")
        case int(slots):
            pool.set_slots(slots)
    say("outer entered on", threading.current_thread().name)
    yield
    say("outer left")
    if SETUP.get("start") == "never leave":
        await asyncio.sleep(3600)


@register_lifespan
@contextlib.asynccontextmanager
async def inner() -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:  # entered and left by the same asyncio task, or this raises
        background = group.create_task(asyncio.sleep(3600))
        say("inner entered")
        yield
        background.cancel()
    say("inner left")


async def gate(name: str) -> None:
    """Wait until the test opens the gate (any number may pass)."""
    while not _is_open(name):
        await asyncio.sleep(0.01)


def blocking_gate(name: str) -> None:
    while not _is_open(name):
        time.sleep(0.01)


def _is_open(name: str) -> bool:
    try:
        return bool(client.exists(f"gate {name}"))
    except redis.ConnectionError:  # a test stops the server
        return False


@app.task
async def wait(name: str, at: str = "gate") -> str:
    say("started", name)
    try:
        await gate(at)
    except asyncio.CancelledError:
        say("cancelled", name)
        raise
    say("finished", name)
    return name


@app.task(acks_late=False)
async def wait_acked(name: str, at: str = "gate") -> str:
    """Acknowledged as it starts: Celery then fetches one more message, which waits for a slot."""
    say("started", name)
    await gate(at)
    return name


@app.task(bind=True)
async def where(self) -> dict:
    await asyncio.sleep(0)
    return {
        "thread": threading.current_thread().name,
        "id": self.request.id,
        "current": current_task.name,
        "loop": asyncio.get_running_loop() is AsyncioPool.current().loop,
    }


@app.task(bind=True, base=AsyncTask)
async def helped(self) -> list[str]:
    async def child() -> str:
        await asyncio.sleep(0)
        return self.request.id

    return [self.request.id, await asyncio.create_task(child()), await asyncio.to_thread(lambda: self.request.id)]


@app.task
def plain() -> str:
    return threading.current_thread().name


@app.task(bind=True)
async def end(self, how: str) -> str:
    """Runs are counted under the task's id."""
    client.incr(self.request.id)
    await asyncio.sleep(0)
    match how:
        case "fail":
            raise ValueError("no")
        case "retry":
            if self.request.retries < 2:
                raise self.retry(countdown=0)
        case "ignore":
            raise Ignore
        case "reject":
            raise Reject("unwanted", requeue=False)
        case "exit":
            sys.exit(3)
        case "no memory":
            raise MemoryError
        case "cancelled from inside":
            helper = asyncio.create_task(asyncio.sleep(3600))
            asyncio.get_running_loop().call_soon(helper.cancel)
            await helper
        case "exit of a child":
            helper = asyncio.create_task(_exit())
            await asyncio.wait([helper])
            return type(helper.exception()).__name__
    return "fine"


@app.task
async def forgotten(how: str) -> None:
    """Says when an object of the task's own is gone, which no garbage collection helps any more."""

    class Kept:
        pass

    gc.disable()
    kept = Kept()
    weakref.finalize(kept, say, "gone", how)
    await asyncio.sleep(0)
    try:
        raise OSError("what was behind it")
    except OSError as error:
        if how == "fail":
            raise ValueError("no") from error
        if how == "ignore":
            raise Ignore from error


@app.task
def collect_garbage() -> None:
    gc.enable()


async def _exit() -> None:
    sys.exit(3)


@app.task(bind=True, autoretry_for=(OSError,), default_retry_delay=0, retry_backoff=False)
async def flaky(self) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 1:
        raise OSError("try again")
    return self.request.retries


@app.task(soft_time_limit=0.2)
async def soft(how: str) -> str:
    match how:
        case "caught":
            try:
                await asyncio.sleep(3600)
            except SoftTimeLimitExceeded:
                async with asyncio.timeout(60):  # the task isn't being cancelled any more
                    await asyncio.sleep(0.01)
                return "partial"
        case "with children":
            async with asyncio.TaskGroup() as group:
                group.create_task(_child())
    await asyncio.sleep(3600)
    return "never"


async def _child() -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        say("child over")


@app.task(time_limit=0.2)
async def hard() -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        say("hard over")


@app.task
async def swallow(name: str) -> None:
    say("started", name)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


@app.task
async def block(name: str, at: str) -> None:
    say("started", name)
    blocking_gate(at)


@app.task
def plain_block(name: str, at: str) -> None:
    say("started", name)
    blocking_gate(at)


@app.task
async def child_quits() -> int:
    """What a failing child of SGLang does."""
    code = f"import os; os.kill(os.getppid(), {int(signal.SIGQUIT)})"
    return await asyncio.to_thread(lambda: subprocess.run([sys.executable, "-c", code], check=False).returncode)


@app.task
async def engine_died(is_cold: bool, within_s: float | None = None) -> None:
    AsyncioPool.current().stop_worker("the engine died", 70, is_cold=is_cold, within_s=within_s)


@app.task
async def cancel_everything() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
