"""What tenants may use, and what their webhooks are signed with: set by command line, kept in the fleet's Redis.

Limits are enforced in Redis, so they hold over any number of gateways: requests and tokens per minute by the script
``rate`` at each request, concurrent jobs and the share of a queue by ``submit`` itself.
"""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenfleet.producer.apikeys import checked_tenant
from tokenfleet.wire import scripts
from tokenfleet.wire.errors import Overloaded
from tokenfleet.wire.keys import Keys

_CACHE_S = 2.0


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """None: no limit. Tokens are prompt and completion, of jobs outside the batch lane: an estimate is
    taken by ``submit``, and settled when the job has ended."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent_jobs: int | None = None
    """Jobs that wait or run."""
    queue_share: float | None = None
    """Of the jobs that may wait for one model: 0.1 is a tenth of ``max_queued``."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What is left of a tenant's limits per minute."""

    is_allowed: bool
    wait_ms: int
    buckets: dict[str, tuple[int, int, int]]
    """``requests`` and ``tokens``: limit, left, milliseconds until all is back."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's ``x-ratelimit-*``."""
        return [
            pair
            for kind, (limit, left, reset_ms) in self.buckets.items()
            for pair in (
                (f"x-ratelimit-limit-{kind}".encode(), str(limit).encode()),
                (f"x-ratelimit-remaining-{kind}".encode(), str(left).encode()),
                (f"x-ratelimit-reset-{kind}".encode(), f"{reset_ms / 1000:g}s".encode()),
            )
        ]

    def raise_if_refused(self) -> None:
        """Raises `Overloaded`."""
        if not self.is_allowed:
            what = " and ".join(f"{limit} {kind} a minute" for kind, (limit, _, _) in self.buckets.items())
            raise Overloaded(
                f"You may use {what}.", code="rate_limited", hint="Try again later.", retry_after_s=self.wait_ms / 1000
            )


class Tenants:
    """Over an asyncio Redis client that decodes nothing."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._known: dict[str, tuple[float, bool]] = {}
        """When it was looked up, and whether there are limits per minute: only then is each request counted."""

    async def limits(self, tenant: str) -> Limits:
        stored = await self._client.hget(self._keys.limits, tenant)
        return msgspec.json.decode(stored, type=Limits) if stored else Limits()

    async def set_limits(self, tenant: str, limits: Limits) -> None:
        """They hold at once, but for a tenant that had none: within 2 s. Raises `InvalidRequest`."""
        checked_tenant(tenant)
        if limits == Limits():
            await self._client.hdel(self._keys.limits, tenant)
        else:
            await self._client.hset(self._keys.limits, tenant, msgspec.json.encode(limits))

    async def take(self, tenant: str, requests: int) -> Rate | None:
        """Count ``requests`` (0 only looks) against the tenant's limits per minute; None if it has none."""
        read_s, has_rate = self._known.get(tenant, (0.0, False))
        if not has_rate:
            if time.monotonic() - read_s < _CACHE_S:
                return None
            limits = await self.limits(tenant)
            has_rate = limits.requests_per_minute is not None or limits.tokens_per_minute is not None
            self._known[tenant] = (time.monotonic(), has_rate)
            if not has_rate:
                return None
        r = await scripts.run(self._client, "rate", self._keys.prefix, tenant, requests)
        told = {"requests": tuple(map(int, r[1:4])), "tokens": tuple(map(int, r[4:7]))}
        if not any(limit for limit, _, _ in told.values()):
            self._known.pop(tenant)
        return Rate(bool(r[0]), int(r[7]), {kind: bucket for kind, bucket in told.items() if bucket[0]})  # type: ignore[misc]

    async def new_webhook_secret(self, tenant: str) -> str:
        """Replaces the old one. Stored as it is, since signing needs it. Raises `InvalidRequest`."""
        if tenant:
            checked_tenant(tenant)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        await self._client.hset(self._keys.webhook_secrets, tenant, secret)
        return secret

    async def webhook_secret(self, tenant: str) -> str | None:
        stored = await self._client.hget(self._keys.webhook_secrets, tenant)
        return stored.decode() if stored else None
