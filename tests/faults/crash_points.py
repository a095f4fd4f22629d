"""A process that dies at its k-th call to Redis: ``python crash_points.py URL FLEET FOLDER``, then orders on stdin.

Each order is one JSON line, run in a fork of the warm process, answered with its exit status on stdout:
    {"role": "worker", "k": 7, "when": "before" | "after"}   serve one job from the queue; die at call k, or end well
    {"role": "producer", "k": …, "when": …, "job": id}       submit, read to the end
    {"role": "healer"}                                       serve until killed; answered with its pid at once
    {"kill": pid}                                            kill a healer; answered when it is dead
``before``: the call is never made. ``after``: it is made and its reply is lost with the process. Status 77: it died.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

import redis.asyncio.connection
import redis.connection

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.wire import urls
from tokenfleet.wire.keys import Keys
from tokenfleet.workers.guardian import Guardian
from tokenfleet.workers.runtime import Runtime
from tokenfleet.workers.served import Served
from tokenfleet.workers.settings import LeaseSettings, WorkerSettings

DIED = 77
LEASE = LeaseSettings(heartbeat_s=0.25, lease_s=0.8)


def die_at_call(k: int, when: str) -> None:
    """Count all that is sent to Redis, by blocking and asyncio clients alike."""
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        if calls == k and when == "before":
            os._exit(DIED)
        return calls == k

    blocking = redis.connection.AbstractConnection.send_packed_command
    waiting = redis.asyncio.connection.AbstractConnection.send_packed_command

    def send(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        is_last = count()
        blocking(self, command, *args, **kwargs)
        if is_last:
            os._exit(DIED)

    async def send_async(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        is_last = count()
        await waiting(self, command, *args, **kwargs)
        if is_last:
            os._exit(DIED)

    redis.connection.AbstractConnection.send_packed_command = send  # type: ignore[method-assign]
    redis.asyncio.connection.AbstractConnection.send_packed_command = send_async  # type: ignore[method-assign]


async def serve(url: str, fleet: str, record: str, jobs: int | None) -> None:
    """A worker without Celery: messages come from the same list."""
    settings = WorkerSettings(
        redis_url=url, fleet=fleet, model="scripted", engine="scripted", lease=LEASE,
        engine_args={"salted": True, "token_ms": 1.0, "record_path": record},
    )  # fmt: skip
    runtime = Runtime(
        settings, Served(settings), lambda: urls.connect_async(url), lambda: urls.connect(url),
        lambda reason: os._exit(1), lambda is_busy: None, lambda job_id: None,
    )  # fmt: skip
    broker = urls.connect_async(url)
    async with runtime.open():
        while jobs is None or jobs > 0:
            if message := await broker.brpop([Keys(fleet).queue("scripted")], timeout=0.2):
                await runtime.run_job(json.loads(message[1])["headers"]["id"])
                jobs = None if jobs is None else jobs - 1
    await broker.aclose()


async def produce(url: str, fleet: str, job: str) -> None:
    async with AsyncClient(url, fleet=fleet, model="scripted") as client:
        submitted = await client.submit("count", job_id=job, max_new_tokens=12)
        await submitted.result(30)


def run(order: dict[str, Any], url: str, fleet: str, folder: str) -> int:
    if "k" in order:
        die_at_call(order["k"], order["when"])
    record = f"{folder}/record-{os.getpid()}.jsonl"
    if order["role"] == "producer":
        asyncio.run(produce(url, fleet, order["job"]))
    else:
        asyncio.run(serve(url, fleet, record, 1 if order["role"] == "worker" else None))
    return 0


def main() -> None:
    url, fleet, folder = sys.argv[1:]
    Guardian.tell = lambda self, worker_id: None  # type: ignore[method-assign]  # takeovers by the lease alone
    for line in sys.stdin:
        order = json.loads(line)
        if healer := order.get("kill"):
            os.kill(healer, signal.SIGKILL)
            print(os.waitpid(healer, 0)[1], flush=True)
            continue
        if (pid := os.fork()) == 0:
            status = 1
            with contextlib.suppress(KeyboardInterrupt):
                status = run(order, url, fleet, folder)
            os._exit(status)
        if order["role"] == "healer":
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
