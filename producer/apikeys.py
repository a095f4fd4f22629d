"""API keys: made and revoked by command line, stored hashed in the fleet's Redis. Deny by default once there is one.

A key is 256 random bits, so its plain SHA-256 is as hard to invert as the key is to guess; looking a hash up takes the
same time whatever was sent, so nothing is compared byte by byte.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import Any

import msgspec

from tokenfleet.wire.errors import InvalidRequest, Unauthorized
from tokenfleet.wire.keys import Keys

_CACHE_S = 2.0
_MOST_REMEMBERED = 1000


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """``id`` names the key to people; it is no secret."""

    id: str
    tenant: str
    created_s: int = 0
    note: str = ""


def checked_tenant(name: str) -> str:
    """A tenant's name is part of names in Redis. Raises `InvalidRequest`."""
    if not re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", name):
        raise InvalidRequest(f"tenant {name[:64]!r}: use 1 to 64 letters, digits, '_', '.', '@' or '-'.")
    return name


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyStore:
    """Over an asyncio Redis client that decodes nothing. ``always`` demands a key even while there is none."""

    def __init__(self, client: Any, keys: Keys, *, always: bool = False) -> None:
        self._client = client
        self._always = always
        self._name = f"{keys.prefix}apikeys"
        self._known: dict[str, tuple[float, ApiKey]] = {}
        self._no_keys: dict[str, float] = {}  # what was sent while there were no keys at all; none of it becomes one
        self._has_any = (0.0, False)

    async def create(self, tenant: str, note: str = "") -> tuple[str, ApiKey]:
        """A new key. The secret is shown this once. Raises `InvalidRequest`."""
        checked_tenant(tenant)
        secret = f"tf-{secrets.token_urlsafe(32)}"
        entry = ApiKey(secrets.token_hex(4), tenant, int(time.time()), note)
        await self._client.hset(self._name, _hash(secret), msgspec.json.encode(entry))
        return secret, entry

    async def list(self) -> list[ApiKey]:
        stored = await self._client.hvals(self._name)
        return sorted((msgspec.json.decode(value, type=ApiKey) for value in stored), key=lambda key: key.created_s)

    async def revoke(self, key_id: str) -> bool:
        for digest, value in (await self._client.hgetall(self._name)).items():
            if msgspec.json.decode(value, type=ApiKey).id == key_id:
                return bool(await self._client.hdel(self._name, digest))
        return False

    async def has_any(self) -> bool:
        checked, has = self._has_any
        if not has and time.monotonic() - checked > _CACHE_S:
            has = bool(await self._client.hlen(self._name))
            self._has_any = (time.monotonic(), has)
        return has

    async def tenant_of(self, authorization: str | None) -> str:
        """Whose request this is; "" while no keys exist. A revoked key works for at most 2 s more.

        Raises `Unauthorized`."""
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and secret:
            digest = _hash(secret.strip())
            if time.monotonic() - self._no_keys.get(digest, 0.0) < _CACHE_S:
                return ""
            checked, known = self._known.get(digest, (0.0, None))
            if known is None or time.monotonic() - checked > _CACHE_S:
                value = await self._client.hget(self._name, digest)
                self._known.pop(digest, None)
                if value is None:
                    if self._always or await self.has_any():
                        raise Unauthorized("This API key is not valid.", hint="`tokenfleet keys create` makes one.")
                    if len(self._no_keys) > _MOST_REMEMBERED:
                        self._no_keys.clear()
                    self._no_keys[digest] = self._has_any[0]
                    return ""
                known = msgspec.json.decode(value, type=ApiKey)
                self._known[digest] = (time.monotonic(), known)
            return known.tenant
        if self._always or await self.has_any():
            raise Unauthorized(
                "An API key is needed.", hint="Send 'Authorization: Bearer KEY'.", code="missing_api_key"
            )
        return ""
