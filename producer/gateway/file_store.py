"""Stored files: bytes in the storage, records in Redis."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.storage import Storage
from tokenfleet.wire import scripts
from tokenfleet.wire.errors import FleetUnavailable, InvalidRequest
from tokenfleet.wire.keys import Keys

_ID = re.compile(r"file-[0-9a-f]{32}")


class StorageFull(InvalidRequest):
    code = "storage_full"
    http_status = 413


@asynccontextmanager
async def storage_translated() -> AsyncIterator[None]:
    """The storage's failures as ours: it is full, away, or lost what a record tells of."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("The file's content is gone.", param="file_id") from error
    except OSError as error:
        raise FleetUnavailable("The storage failed.", code="storage_failed", hint="Try again later.") from error


class StoredFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """``filename`` is the caller's own word: it goes back to him and nowhere else."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    object: str
    sha256: str = ""
    expires_at: int | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's ``file``."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """Over an asyncio Redis client that decodes nothing. ``quota_bytes`` is what one tenant may store."""

    def __init__(self, client: Any, keys: Keys, storage: Storage, quota_bytes: int) -> None:
        self._client = client
        self._keys = keys
        self._storage = storage
        self._quota_bytes = quota_bytes

    async def write(self, file_id: str, pieces: AsyncIterator[bytes]) -> tuple[str, int]:
        """Store bytes that no record tells of yet: their object's name, and how many."""
        name = f"files/{file_id}-{secrets.token_hex(8)}"
        return name, await self._storage.write(name, pieces)

    async def add(self, file: StoredFile, *, is_free: bool = False) -> StoredFile:
        """Record a file whose bytes are stored; the one that was there with its id, if any. What we write ourselves
        is free of the quota. Raises `StorageFull`."""
        quota_bytes = 2**53 if is_free else self._quota_bytes
        ends_ms = (file.expires_at or 0) * 1000
        reply = await self._run(
            "add", file.id, msgspec.json.encode(file), file.tenant, file.bytes, ends_ms, quota_bytes
        )
        match reply[0]:
            case b"added":
                return file
            case b"exists":
                await self._storage.delete(file.object)
                return msgspec.json.decode(reply[1], type=StoredFile)
        await self._storage.delete(file.object)
        raise StorageFull(
            f"{int(reply[1])} bytes are stored of {self._quota_bytes} that you may.", hint="Delete files first."
        )

    async def get(self, file_id: str, tenant: str) -> StoredFile:
        """Raises `NotFound`."""
        if _ID.fullmatch(file_id) and (stored := await self._client.get(self._keys.file(file_id))):
            file = msgspec.json.decode(stored, type=StoredFile)
            if file.tenant == tenant and not (file.expires_at and file.expires_at <= time.time()):
                return file
        raise NotFound(f"There is no file {file_id[:64]!r}.", param="file_id")

    def read(self, file: StoredFile, start: int = 0) -> AsyncGenerator[bytes, None]:
        """Raises `FileNotFoundError`."""
        return self._storage.read(file.object, start)

    async def list(self, tenant: str) -> list[StoredFile]:
        """All of a tenant's, the oldest first."""
        ids = await self._client.zrange(self._keys.files(tenant), 0, -1)
        stored = await self._client.mget([self._keys.file(i.decode()) for i in ids]) if ids else []
        files = [msgspec.json.decode(each, type=StoredFile) for each in stored if each]
        return [file for file in files if not (file.expires_at and file.expires_at <= time.time())]

    async def delete(self, file_id: str) -> None:
        """The record first: bytes without a record hurt nobody, a record without bytes would."""
        reply = await self._run("drop", file_id)
        if reply[0] == b"dropped":
            await self._storage.delete(msgspec.json.decode(reply[1], type=StoredFile).object)

    async def sweep(self) -> None:
        """Delete what has expired."""
        now_ms = int(time.time() * 1000)
        for file_id in await self._client.zrangebyscore(self._keys.file_ends, "-inf", now_ms, start=0, num=100):
            await self.delete(file_id.decode())

    async def _run(self, *args: scripts.Arg) -> Any:
        return await scripts.run(self._client, "file", self._keys.prefix, *args)
