"""A fleet at a glance: what it serves, who works, what waits, how full its Redis is."""

from __future__ import annotations

from typing import Any

import msgspec

from tokenfleet.wire.jobs import ServedModel
from tokenfleet.wire.ledger import Ledger, translated


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker with a valid lease, as it tells of itself."""

    id: str
    model: str
    engine: str
    host: str
    pid: int
    running: int
    """Jobs it runs now."""
    slots: int
    """Jobs it can run at once."""
    lease_ms: int
    """What is left of its lease."""


class ModelInfo(msgspec.Struct, frozen=True):
    """A served model, with its queue. It may have no worker now."""

    model: ServedModel
    workers: int
    running: int
    waiting: int


class RedisInfo(msgspec.Struct, frozen=True):
    server: str
    """``Redis 8.0.2`` or ``Valkey 9.1.0``."""
    used_bytes: int
    limit_bytes: int
    """0: none but the machine's. New jobs are refused above 80 % of it."""


class Overview(msgspec.Struct, frozen=True):
    fleet: str
    models: tuple[ModelInfo, ...]
    workers: tuple[WorkerInfo, ...]
    redis: RedisInfo
    dead_letters: int

    @property
    def is_ready(self) -> bool:
        """Whether any worker can take jobs."""
        return bool(self.workers)


async def overview(ledger: Ledger) -> Overview:
    """Raises `FleetUnavailable`."""
    client: Any = ledger.client
    models = await ledger.models()
    workers = tuple(_worker(told) for told in await ledger.workers())
    async with translated():
        info = await client.info()
        pipe = client.pipeline(transaction=False)
        for name in models:
            pipe.zcard(ledger.keys.waiting(name))
        pipe.zcard(ledger.keys.dead)
        *waiting, dead = await pipe.execute()
    return Overview(
        ledger.keys.fleet,
        tuple(
            ModelInfo(
                model,
                sum(worker.model == model.name for worker in workers),
                sum(worker.running for worker in workers if worker.model == model.name),
                count,
            )
            for model, count in zip(models.values(), waiting, strict=True)
        ),
        workers,
        RedisInfo(_server(info), int(info["used_memory"]), int(info.get("maxmemory", 0))),
        dead,
    )


def _worker(told: dict[str, str]) -> WorkerInfo:
    def number(name: str) -> int:
        return int(told[name]) if told.get(name, "").isdecimal() else 0

    return WorkerInfo(
        id=told["id"],
        model=told.get("model", ""),
        engine=told.get("engine", ""),
        host=told.get("host", ""),
        pid=number("pid"),
        running=number("running"),
        slots=number("slots"),
        lease_ms=number("lease_ms"),
    )


def _server(info: dict[str, Any]) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info.get('redis_version', '?')}"
