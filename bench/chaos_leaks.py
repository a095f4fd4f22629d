"""Many short jobs, with cancels, failures, leaving readers and killed connections: what grows, what is left?

Watched: a worker, a client with its collector (this process), and a gateway that a fifth of the jobs come through."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from tests.fleets import Fleet, wait_until
from tests.gateways import start_gateway
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet import Client
from tokenfleet.wire.errors import TokenfleetError

IN_FLIGHT = 100
RETENTION_S = 2.0
WARM_UP_JOBS = 5000
"""Pools of connections, allocators and Celery's own books fill until then."""


def leak_run(jobs: int) -> str:
    """Returns a paragraph of Markdown."""
    with running_server() as server, tempfile.TemporaryDirectory(prefix="tf-leaks-") as folder:
        fleet = Fleet(RedisServer(server, new_fleet_name()), Path(folder))
        try:
            return _run(fleet, jobs)
        finally:
            fleet.close()


class Watched:
    """Memory as jobs go by, and what was open before."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.samples: list[tuple[int, float]] = []
        self.before = self._open()

    def sample(self, done: int) -> None:
        self.samples.append((done, self.process.memory_info().rss / 2**20))

    def _open(self) -> tuple[int, int]:
        return self.process.num_fds(), self.process.num_threads()

    def told(self, name: str) -> str:
        (fds, threads), (more_fds, more_threads) = self.before, self._open()
        after = [point for point in self.samples if point[0] >= WARM_UP_JOBS] or self.samples
        slope = 10_000 * _slope(after)
        return (
            f"| {name} | {self.samples[0][1]:.0f} MB | {after[0][1]:.1f} MB | {after[-1][1]:.1f} MB | {slope:+.2f} MB "
            f"| {more_fds - fds:+d} | {more_threads - threads:+d} |"
        )


async def _one(client: Client, web: httpx.AsyncClient, number: int, tokens: int) -> None:
    fault = " [[fault: raise at 2]]" if number % 50 == 9 else ""
    if number % 5 == 2:
        body = {"model": "scripted", "messages": [{"role": "user", "content": f"{number}{fault}"}],
                "max_tokens": tokens, "stream": bool(number % 2)}  # fmt: skip
        if number % 30 == 7:  # a client that leaves
            async with web.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
                await anext(reply.aiter_raw(), None)
        else:
            await web.post("/v1/chat/completions", json=body)
        return
    job = await client.aio.submit(f"{number}{fault}", max_new_tokens=tokens, retention_s=RETENTION_S)
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


def _run(fleet: Fleet, jobs: int) -> str:
    worker = fleet.start_worker(token_ms=0.0, record_path=None)
    gateway = start_gateway(fleet)
    client = fleet.client(model="scripted")
    chance = random.Random(3)
    watched: dict[str, Watched] = {}
    done = 0

    async def lane(numbers: range, web: httpx.AsyncClient, killer: Any) -> None:
        nonlocal done
        for number in numbers:
            await _one(client, web, number, chance.randrange(1, 12))
            done += 1
            if done % max(1, jobs // 40) == 0:
                for each in watched.values():
                    each.sample(done)
            if done % 2000 == 0:
                await asyncio.to_thread(killer.client_kill_filter, _type="pubsub")

    async def all_lanes(killer: Any) -> None:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as web:
            await asyncio.gather(*(lane(range(k, jobs, IN_FLIGHT), web, killer) for k in range(IN_FLIGHT)))

    try:
        with fleet.redis.client(decode_responses=True) as killer:
            client.submit("warm up", max_new_tokens=3, retention_s=RETENTION_S).result(30)
            pids = {"worker": worker.pid, "client with collector": os.getpid(), "gateway": gateway.process.pid}
            watched |= {name: Watched(pid) for name, pid in pids.items()}
            started = time.monotonic()
            client.thread.run(all_lanes(killer))
            took_s = time.monotonic() - started
            prefix = f"tokenfleet:{fleet.redis.fleet}:"
            # The gateway's jobs are kept for ten minutes: let time pass for them.
            for key in killer.scan_iter(f"{prefix}*", count=1000):
                if killer.pttl(key) > 10_000:
                    killer.pexpire(key, 1)
            for key in killer.scan_iter("celery-task-meta-*", count=1000):
                killer.pexpire(key, 1)

            def left() -> list[str]:
                kept = ("models", "queues", "meta", "workers", "worker:", "order:")
                mine = [k.removeprefix(prefix) for k in killer.scan_iter(f"{prefix}*", count=1000)]
                return [k for k in mine if not k.startswith(kept)] + list(
                    killer.scan_iter("celery-task-meta-*", count=1000)
                )

            wait_until(lambda: not left(), 30, "everything has expired")
            keys = killer.dbsize()
            rows = "\n".join(each.told(name) for name, each in watched.items())
    finally:
        gateway.close()
    return (
        f"Leaks: {jobs:,} short jobs in {took_s:.0f} s ({jobs / took_s:.0f}/s), a fifth through the gateway, with "
        f"cancels, failing requests, readers and HTTP clients that left early, killed connections; {RETENTION_S:g} s "
        f"retention. Keys left of any job: 0 (of {keys} in Redis). The slope is of all after the first "
        f"{WARM_UP_JOBS:,} jobs; descriptors and threads are against before the first (connection pools grow to their "
        f"bound of 48).\n\n"
        f"| process | memory at first | after {WARM_UP_JOBS:,} | at the end | slope per 10,000 jobs | descriptors | "
        f"threads |\n|---|---|---|---|---|---|---|\n{rows}"
    )


def _slope(points: list[tuple[int, float]]) -> float:
    """Least squares, MB a job."""
    n = len(points)
    if n < 2:
        return 0.0
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
