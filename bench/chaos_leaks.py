"""Many short jobs, with cancels, failures, leaving readers and killed connections: what grows, what is left?"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path

import psutil

from tests.fleets import Fleet, wait_until
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet.wire.errors import TokenfleetError

IN_FLIGHT = 100


def leak_run(jobs: int) -> str:
    """Returns a paragraph of Markdown."""
    with running_server() as server, tempfile.TemporaryDirectory(prefix="tf-leaks-") as folder:
        fleet = Fleet(RedisServer(server, new_fleet_name()), Path(folder))
        try:
            return _run(fleet, jobs)
        finally:
            fleet.close()


def _run(fleet: Fleet, jobs: int) -> str:
    worker = fleet.start_worker(token_ms=0.0, record_path=None)
    client = fleet.client(model="scripted")
    processes = {"worker": psutil.Process(worker.pid), "client": psutil.Process(os.getpid())}
    chance = random.Random(3)
    samples: dict[str, list[tuple[int, float]]] = {name: [] for name in processes}
    done = 0

    async def one(number: int) -> None:
        nonlocal done
        fault = " [[fault: raise at 2]]" if number % 50 == 9 else ""
        job = await client.aio.submit(f"{number}{fault}", max_new_tokens=chance.randrange(1, 12), retention_s=2.0)
        try:
            if number % 20 == 0:
                await job.cancel()
            if number % 30 == 1:
                async with job.stream() as stream:
                    await stream.next_batch()
            else:
                await job.result(120)
        except TokenfleetError:
            pass
        done += 1
        if done % max(1, jobs // 20) == 0:
            for name, process in processes.items():
                samples[name].append((done, process.memory_info().rss / 2**20))
        if done % 2000 == 0:
            await asyncio.to_thread(killer.client_kill_filter, _type="pubsub")

    async def lane(numbers: range) -> None:
        for number in numbers:
            await one(number)

    async def all_lanes() -> None:
        await asyncio.gather(*(lane(range(k, jobs, IN_FLIGHT)) for k in range(IN_FLIGHT)))

    with fleet.redis.client(decode_responses=True) as killer:
        client.submit("warm up", max_new_tokens=3, retention_s=2.0).result(30)
        fds = {name: process.num_fds() for name, process in processes.items()}
        started = time.monotonic()
        client.thread.run(all_lanes())
        took_s = time.monotonic() - started
        prefix = f"tokenfleet:{fleet.redis.fleet}:"

        def left() -> list[str]:
            kept = ("models", "queues", "meta", "workers", "worker:", "order:")
            mine = [k.removeprefix(prefix) for k in killer.scan_iter(f"{prefix}*", count=1000)]
            return [k for k in mine if not k.startswith(kept)] + list(
                killer.scan_iter("celery-task-meta-*", count=1000)
            )

        wait_until(lambda: not left(), 30, "everything has expired")
        more_fds = {name: process.num_fds() - fds[name] for name, process in processes.items()}
        keys = killer.dbsize()
    slopes = {name: _slope(points[len(points) // 4 :]) for name, points in samples.items()}
    return (
        f"Leaks: {jobs:,} short jobs in {took_s:.0f} s ({jobs / took_s:.0f}/s) with cancels, failing requests, readers "
        f"that left early and killed connections, 2 s retention. Memory per 10,000 jobs after warm-up: "
        + ", ".join(f"{name} {slope * 10_000:+.2f} MB" for name, slope in slopes.items())
        + f"; descriptors more than before: {more_fds}; keys left of any job: 0 (of {keys} in Redis)."
    )


def _slope(points: list[tuple[int, float]]) -> float:
    """Least squares, MB a job."""
    n = len(points)
    if n < 2:
        return 0.0
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
