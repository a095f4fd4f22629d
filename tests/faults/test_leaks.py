"""After the end and the retention of all jobs nothing of them is left: no key, no slot, no descriptor, no thread."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import psutil

from tests.faults.trial import Trial, dump, running
from tests.fleets import Fleet, wait_until
from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.wire.urls import _MOST_CONNECTIONS


def keys_of(fleet: Fleet) -> dict[str, int]:
    """Every key of the server, Celery's included, with its time to live in ms (-1: for ever)."""
    with fleet.redis.client(decode_responses=True) as client:
        names = sorted(client.scan_iter(count=1000))
        pipe = client.pipeline(transaction=False)
        for name in names:
            pipe.pttl(name)
        return dict(zip(names, pipe.execute(), strict=True))


def test_nothing_is_left_after_retention(fleet: Fleet) -> None:
    """Jobs that finish, fail, are cancelled, expire, lose their worker; readers that leave early."""
    chance = random.Random(5)
    first, second = (fleet.start_worker(salted=True, token_ms=1.0, wait=False) for _ in range(2))
    for index, worker in enumerate((first, second)):
        fleet.wait_ready(worker, index)
    with Trial(fleet) as trial:
        with contextlib.suppress(TokenfleetError):  # forgotten by now
            trial.submit("warm up", max_new_tokens=3, retention_s=1.0).result(20)
        process = psutil.Process(second.pid)
        wait_until(lambda: not any("job:" in name for name in keys_of(fleet)), 20, "the first job is forgotten")
        before, fds, threads = set(keys_of(fleet)), process.num_fds(), process.num_threads()

        async def use(number: int) -> None:
            faults = ["", "", "", "[[fault: raise at 2]]", "[[eos: 4]]"]
            named = {"queue_ttl_s": 0.001} if number % 40 == 7 else {}
            job = await trial.client.aio.submit(
                f"{number} {chance.choice(faults)}", max_new_tokens=chance.randrange(1, 30), retention_s=2.0,
                priority=chance.choice(["interactive", "normal", "batch"]), **named,
            )  # fmt: skip
            with contextlib.suppress(TokenfleetError):  # also that it is forgotten by now
                if number % 7 == 0:
                    await asyncio.sleep(chance.random() / 20)
                    await job.cancel()
                if number % 11 == 0:
                    async with job.stream() as stream:
                        await stream.next_batch()
                    return
                await job.result(60)

        async def use_all() -> None:
            await asyncio.gather(*(use(number) for number in range(400)))

        work = asyncio.run_coroutine_threadsafe(use_all(), trial.client.thread.loop)
        wait_until(lambda: running(first), 20, "work is in flight")
        first.kill_group()
        work.result(120)
        wait_until(lambda: not running(second), 20, "all slots are free")
        wait_until(lambda: not any(":job:" in name or ":log:" in name for name in keys_of(fleet)), 40, "retention")
        left = {name: ttl for name, ttl in keys_of(fleet).items() if name not in before}
        # What a fleet keeps, however many jobs it has seen; and what kombu makes with its first message.
        left = {name: ttl for name, ttl in left.items() if ":order:" not in name and not name.startswith("_kombu.")}
        left = {name: ttl for name, ttl in left.items() if ":worker" not in name}
        dump(fleet, leftovers=left)
        assert not left
        # A pool keeps the connections that its busiest moment needed; what leaks a descriptor a job leaks 400.
        assert process.num_fds() <= fds + _MOST_CONNECTIONS + 8
        assert process.num_threads() <= threads + 2
        assert not [path for path in Path(f"/proc/{second.pid}/fd").iterdir() if "(deleted)" in str(path.resolve())]
