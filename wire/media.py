"""Images, videos and audios: their bytes lie next to the jobs by content hash, never inside a request or a message.

Small ones are in Redis, large ones in a folder that producers and workers share (`media_files.py`), where there is one.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis.asyncio
from pydantic import BaseModel, ConfigDict, Field

from tokenfleet.wire import scripts
from tokenfleet.wire.chat import ChatRequest, MediaPart, ScoreRequest
from tokenfleet.wire.errors import FleetUnavailable, InvalidRequest, Overloaded
from tokenfleet.wire.keys import Keys, media_entry
from tokenfleet.wire.ledger import media_gone, translated
from tokenfleet.wire.media_files import MediaFolder

MIB = 1024 * 1024


class MediaSettings(BaseModel):
    """What a producer takes in, and where it puts it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path | None = None
    """Shared by producers and workers; without one, what is above ``inline_bytes`` is refused."""
    inline_bytes: int = Field(8 * MIB, ge=0, le=256 * MIB)
    """Up to this size a medium lies in Redis."""
    max_bytes: int = Field(128 * MIB, ge=1)
    """One medium."""
    max_request_bytes: int = Field(256 * MIB, ge=1)
    """All media of one request."""
    max_items: int = Field(128, ge=1)
    """Media of one request."""
    upload_ttl_s: float = Field(600.0, gt=0)
    """How long a medium waits for the job that names it."""

    @property
    def limit_bytes(self) -> int:
        """The largest medium that can be stored."""
        return self.max_bytes if self.folder is not None else min(self.max_bytes, self.inline_bytes)


class MediaStore:
    """One fleet's media. Methods raise `FleetUnavailable` beside what they say."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, settings: MediaSettings) -> None:
        self.settings = settings
        self._client = client
        self._db: Any = client
        self._keys = keys
        self._folder = MediaFolder(settings.folder, keys.fleet) if settings.folder is not None else None
        self._uploads: dict[str, asyncio.Task[None]] = {}

    async def offer(self, tenant: str, media: Mapping[str, bytes]) -> None:
        """Store ``media`` (by sha256), whatever of it is not there yet; all of it then waits for its job.

        Raises `InvalidRequest` (``media_too_large``), `Overloaded` (``memory_full``)."""
        for data in media.values():
            self.check_size(len(data))
        entries = {media_entry(tenant, ref): data for ref, data in media.items()}
        async with translated():
            there = await scripts.run(self._client, "media_touch", self._keys.prefix, self._ttl_ms, *entries)
        # One after the other: each may be as large as Redis takes.
        for (entry, data), is_there in zip(entries.items(), there, strict=True):
            if not is_there:
                await self._once(entry, data)
            elif len(data) > self.settings.inline_bytes and (lost := await self._lost_file(entry)):
                await self._once(entry, data, lost)

    async def aclose(self) -> None:
        """Wait for uploads whose submitters have left."""
        await asyncio.gather(*self._uploads.values(), return_exceptions=True)

    def check_size(self, size: int) -> None:
        """Raises `InvalidRequest` (``media_too_large``)."""
        if size > self.settings.limit_bytes:
            raise too_large(self.settings)

    async def fetch(self, tenant: str, media: Sequence[MediaPart]) -> list[bytes]:
        """The bytes of each, in order. Raises `MediaGone`, or `InvalidRequest` (``invalid_media``) for bytes that are
        not those of their hash. Raises redis-py's own exceptions."""
        refs = list(dict.fromkeys(part.ref for part in media))
        found: dict[str, bytes] = {}
        hint = ""
        for ref in refs:
            data, file = await self._db.hmget(self._keys.media(media_entry(tenant, ref)), "data", "file")
            if data is None and file is not None:
                hint = "Producers and workers must share the media folder (docs/media.md)."
            if data is None and file is not None and self._folder is not None:
                data = await asyncio.to_thread(self._folder.read, media_entry(tenant, ref), file.decode("latin-1"))
            if data is not None:
                found[ref] = data
        if gone := [ref for ref in refs if ref not in found]:
            raise media_gone(gone, hint)
        await asyncio.to_thread(_check_hashes, found)
        return [found[part.ref] for part in media]

    async def sweep(self, *, grace_s: float = 120.0) -> int:
        """Delete files that nothing in Redis names any more; how many. Younger ones may be about to be named."""
        if self._folder is None:
            return 0
        deleted = 0
        for names in await asyncio.to_thread(self._folder.listed, grace_s):
            pipe = self._db.pipeline(transaction=False)
            for entry, _ in names:
                pipe.hget(self._keys.media(entry), "file")
            async with translated():
                stored = await pipe.execute()
            unknown = [found for found, named in zip(names, stored, strict=True) if named != found[1].encode()]
            await asyncio.to_thread(self._folder.delete, unknown)
            deleted += len(unknown)
        return deleted

    @property
    def _ttl_ms(self) -> int:
        return int(self.settings.upload_ttl_s * 1000)

    async def _lost_file(self, entry: str) -> str:
        """The name of a file that Redis tells of and the folder has not: it was emptied, or is another one."""
        async with translated():
            name = await self._db.hget(self._keys.media(entry), "file")
        if name is None or self._folder is None:
            return ""
        found: str = name.decode("latin-1")
        return "" if await asyncio.to_thread(self._folder.has, entry, found) else found

    async def _once(self, entry: str, data: bytes, lost: str = "") -> None:
        """Many jobs submitted at once upload what they share once. An upload goes on when one that waits leaves."""
        upload = self._uploads.get(entry)
        if upload is None:
            upload = self._uploads[entry] = asyncio.create_task(self._put(entry, data, lost))
            upload.add_done_callback(functools.partial(self._uploaded, entry))
        await asyncio.shield(upload)

    def _uploaded(self, entry: str, upload: asyncio.Task[None]) -> None:
        del self._uploads[entry]
        if not upload.cancelled():
            upload.exception()  # whoever waited has it; nobody may have

    async def _put(self, entry: str, data: bytes, lost: str) -> None:
        how, value = "data", data
        if len(data) > self.settings.inline_bytes:
            assert self._folder is not None, "checked by check_size"
            try:
                name = await asyncio.to_thread(self._folder.write, entry, data)
            except OSError as error:
                raise FleetUnavailable(
                    f"The media folder can't be written to: {error.strerror}.", code="media_folder_unavailable"
                ) from error
            how, value = "file", name.encode()
        async with translated():
            reply = await scripts.run(
                self._client, "media_put", self._keys.prefix, entry, self._ttl_ms, len(data), how, value, lost
            )
        if how == "file" and reply[0] != b"stored" and self._folder is not None:
            await asyncio.to_thread(self._folder.delete, [(entry, value.decode())])
        if reply[0] == b"memory_full":
            raise Overloaded(
                f"Redis is {int(reply[1])} % full; new media are taken below 80 %.",
                code="memory_full",
                hint="Try again later, or give Redis more memory.",
                retry_after_s=5.0,
            )


def media_entries(tenant: str, request: ChatRequest | ScoreRequest) -> list[str]:
    """What the ledger is to keep for the request: see `keys.media_entry`."""
    return [media_entry(tenant, part.ref) for part in request.media] if isinstance(request, ChatRequest) else []


def too_large(settings: MediaSettings) -> InvalidRequest:
    return InvalidRequest(
        f"A medium may have at most {settings.limit_bytes} bytes.",
        code="media_too_large",
        hint="Make it smaller."
        if settings.folder is not None
        else "Make it smaller, or set a media folder that producers and workers share.",
        max_bytes=settings.limit_bytes,
    )


def _check_hashes(media: Mapping[str, bytes]) -> None:
    for ref, data in media.items():
        if hashlib.sha256(data).hexdigest() != ref:
            raise InvalidRequest(
                f"The medium {ref[:12]}… was stored with bytes that are not its own.", code="invalid_media"
            )
