"""Batches' records in Redis. Whoever drives a batch holds its lease, and writes nothing once another has it."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec

from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.wire import scripts
from tokenfleet.wire.errors import InvalidRequest, JobConflict, Overloaded
from tokenfleet.wire.keys import Keys

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
MOST_UNENDED = 100
"""Batches of one tenant."""
_ID = re.compile(r"batch_[0-9a-f]{32}")


class Fenced(Exception):
    """Another gateway drives this batch now."""


class Fixed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a batch was created with."""

    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    metadata: dict[str, str] | None = None
    output_expiry_s: float | None = None


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A stored piece of the output ("out") or of the errors ("err")."""

    kind: str
    name: str


class Progress(msgspec.Struct, omit_defaults=True):
    """What a driver knows of a batch; the next one goes on from here. ``row`` and ``offset`` (bytes of the input) are
    the first not yet in a part."""

    total: int = 0
    row: int = 0
    offset: int = 0
    ok: int = 0
    bad: int = 0
    unrun: int = 0
    """Of ``bad``: rows that the batch ended before."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    model: str | None = None
    parts: list[Part] = []
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None


class Record(msgspec.Struct):
    id: str
    tenant: str
    status: str
    fixed: Fixed
    progress: Progress
    times_ms: dict[str, int]
    """``created``, ``in_progress``, ``finalizing``, ``completed``, ...: when."""
    completed: int
    failed: int

    @property
    def expires_s(self) -> float:
        return self.times_ms["created"] / 1000 + self.fixed.window_s

    def shown(self) -> dict[str, Any]:
        """OpenAI's ``batch``."""

        def at(name: str) -> int | None:
            return self.times_ms[name] // 1000 if name in self.times_ms else None

        p = self.progress
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.fixed.endpoint,
            "model": p.model,
            "errors": {"object": "list", "data": p.errors} if p.errors else None,
            "input_file_id": self.fixed.input_file_id,
            "completion_window": self.fixed.completion_window,
            "status": self.status,
            "output_file_id": p.output_file_id,
            "error_file_id": p.error_file_id,
            "created_at": at("created"),
            "in_progress_at": at("in_progress"),
            "expires_at": int(self.expires_s),
            "finalizing_at": at("finalizing"),
            "completed_at": at("completed"),
            "failed_at": at("failed"),
            "expired_at": at("expired"),
            "cancelling_at": at("cancelling"),
            "cancelled_at": at("cancelled"),
            "request_counts": {"total": p.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": p.input_tokens,
                "input_tokens_details": {"cached_tokens": p.cached_tokens},
                "output_tokens": p.output_tokens,
                "output_tokens_details": {"reasoning_tokens": p.reasoning_tokens},
                "total_tokens": p.input_tokens + p.output_tokens,
            },
            "metadata": self.fixed.metadata,
        }


class BatchStore:
    """Over an asyncio Redis client that decodes nothing."""

    def __init__(self, client: Any, keys: Keys, *, lease_s: float, retention_s: float) -> None:
        self._client = client
        self._keys = keys
        self.lease_ms = int(lease_s * 1000)
        self._keep_ms = int(retention_s * 1000)

    async def create(self, batch_id: str, tenant: str, fixed: Fixed, digest: str, hook: bytes) -> None:
        """The same again is a no-op. Raises `JobConflict`, `Overloaded`."""
        reply = await self._run("create", batch_id, digest, tenant, msgspec.json.encode(fixed), hook, MOST_UNENDED)
        if reply[0] == b"full":
            raise Overloaded(
                f"{MOST_UNENDED} of your batches have not ended; you may have no more.", code="too_many_batches",
                hint="Try again when one has ended.", retry_after_s=60.0,
            )  # fmt: skip
        if reply[0] == b"conflict":
            raise JobConflict("This Idempotency-Key was used with another batch.", hint="Use a new key.")

    async def get(self, batch_id: str, tenant: str | None = None) -> Record:
        """Raises `NotFound`; ``tenant`` None is for a driver."""
        stored = await self._client.hgetall(self._keys.batch(batch_id)) if _ID.fullmatch(batch_id) else {}
        if b"fixed" not in stored or (tenant is not None and stored[b"tenant"].decode() != tenant):
            raise NotFound(f"There is no batch {batch_id[:64]!r}.", param="batch_id")
        f = {name.decode(): value for name, value in stored.items()}
        return Record(
            id=batch_id,
            tenant=f["tenant"].decode(),
            status=f["status"].decode(),
            fixed=msgspec.json.decode(f["fixed"], type=Fixed),
            progress=msgspec.json.decode(f.get("progress", b"{}"), type=Progress),
            times_ms={n.removesuffix("_ms"): int(v) for n, v in f.items() if n.endswith("_ms") and n != "lease_ms"},
            completed=int(f.get("completed", 0)),
            failed=int(f.get("failed", 0)),
        )

    async def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[Record], bool]:
        """The newest first, from behind ``after`` on; whether there are more. Raises `InvalidRequest`."""
        name, begin = self._keys.batches(tenant), 0
        # Index entries outlive their records; no record outlives this.
        await self._client.zremrangebyscore(name, "-inf", (time.time() - 90 * 86400) * 1000)
        if after is not None:
            rank = await self._client.zrevrank(name, after)
            if rank is None:
                raise InvalidRequest("after: there is no such batch.", param="after")
            begin = rank + 1
        ids = [i.decode() for i in await self._client.zrevrange(name, begin, begin + limit)]
        found = []
        for batch_id in ids[:limit]:
            try:
                found.append(await self.get(batch_id, tenant))
            except NotFound:
                await self._client.zrem(name, batch_id)
        return found, len(ids) > limit

    async def cancel(self, batch_id: str) -> None:
        await self._run("cancel", batch_id)

    async def take(self, owner: str, at_most: int) -> list[str]:
        """Batches that nobody drives; they are ``owner``'s from now on."""
        return [i.decode() for i in await self._run("take", owner, self.lease_ms, at_most)]

    async def save(self, batch_id: str, owner: str, **fields: str | int | bytes) -> str:
        """Write as the batch's driver, and renew the lease. Returns the status now. Raises `Fenced`."""
        pairs = [part for pair in fields.items() for part in pair]
        reply = await self._run("save", batch_id, owner, self.lease_ms, self._keep_ms, *pairs)
        if reply[0] == b"fenced":
            raise Fenced
        return str(reply[1].decode())

    async def release(self, batch_id: str, owner: str) -> None:
        """Let another gateway go on at once."""
        await self._run("release", batch_id, owner)

    async def _run(self, *args: scripts.Arg) -> Any:
        return await scripts.run(self._client, "batch", self._keys.prefix, *args)
