"""Where files lie: a folder, or a bucket. Names are the gateway's own, never a caller's."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Protocol

from tokenfleet.wire.errors import ConfigurationError

PIECE_BYTES = 256 * 1024
_NAME = re.compile(r"[a-z]+/[a-z0-9_-]{1,80}(/[a-z0-9_-]{1,80})?")


class Storage(Protocol):
    """Objects by name: written whole or not at all, never changed. Raises `OSError` when the store can't be reached."""

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """Store what comes; its bytes. Durable when it returns."""

    def read(self, name: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        """From byte ``start`` on, piece by piece. Raises `FileNotFoundError`."""

    async def delete(self, name: str) -> None:
        """Also what is not there."""

    async def delete_below(self, name: str) -> None:
        """All objects ``name/...``."""


def open_storage(where: str, fleet: str) -> Storage:
    """By the setting ``storage``: a folder, a bucket's URL, or "" for this user's data folder."""
    if where.startswith(("s3://", "gs://", "az://")):
        try:
            from tokenfleet.producer.gateway.bucket import BucketStorage
        except ImportError as error:
            raise ConfigurationError(
                f"Buckets need a package that is not installed ({error.name}).",
                code="missing_extra",
                hint="Install it: pip install 'tokenfleet[s3]'",
            ) from error
        return BucketStorage(where)
    if "://" in where:
        raise ConfigurationError(f"storage: {where.partition(':')[0]}:// is not known.", hint="A folder, or s3://…")
    # An entry point's default: where this user's programs keep what they need again.
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return FolderStorage(Path(where) if where else Path(home) / "tokenfleet" / fleet / "storage")


class FolderStorage:
    """A local folder, or one on a file system that all gateways share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        path = self._path(name)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        size = 0
        await asyncio.to_thread(path.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
        try:
            with await asyncio.to_thread(open, part, "xb") as file:
                async for piece in pieces:
                    size += len(piece)
                    await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(_settle, file.fileno(), file.flush)
            await asyncio.to_thread(_rename, part, path)
        finally:
            part.unlink(missing_ok=True)
        return size

    async def read(self, name: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        with await asyncio.to_thread(open, self._path(name), "rb") as file:
            file.seek(start)
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._path(name).unlink, missing_ok=True)

    async def delete_below(self, name: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._path(name), ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), name
        return self._folder / name


def _settle(fd: int, flush: object) -> None:
    assert callable(flush)
    flush()
    os.fsync(fd)


def _rename(part: Path, path: Path) -> None:
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the name may be gone after a power loss, though its bytes are there
    finally:
        os.close(folder)
