"""A folder and a bucket keep files alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tokenfleet.producer.gateway.bucket import BucketStorage
from tokenfleet.producer.gateway.storage import FolderStorage, Storage, open_storage
from tokenfleet.wire.errors import ConfigurationError


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "s") if request.param == "folder" else BucketStorage("memory:///")


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(storage: Storage, name: str, start: int = 0) -> bytes:
    return b"".join([piece async for piece in storage.read(name, start)])


async def test_what_is_written_is_read_from_any_byte_on(storage: Storage) -> None:
    whole = b"a" * 300_000 + b"b" * 7
    assert await storage.write("files/x", pieces(whole[:299_999], whole[299_999:])) == len(whole)
    assert await read(storage, "files/x") == whole
    assert await read(storage, "files/x", 300_000) == b"b" * 7
    assert await read(storage, "files/x", len(whole)) == b""
    assert await storage.write("files/empty", pieces()) == 0
    assert await read(storage, "files/empty") == b""


async def test_what_is_deleted_is_gone(storage: Storage) -> None:
    for name in ("batches/b1/p1", "batches/b1/p2", "batches/b2/p1"):
        await storage.write(name, pieces(name.encode()))
    await storage.delete_below("batches/b1")
    await storage.delete("files/never-there")
    for name in ("batches/b1/p1", "batches/b1/p2", "files/never-there"):
        with pytest.raises(FileNotFoundError):
            await read(storage, name)
    assert await read(storage, "batches/b2/p1") == b"batches/b2/p1"
    await storage.delete("batches/b2/p1")
    with pytest.raises(FileNotFoundError):
        await read(storage, "batches/b2/p1")


async def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    storage = FolderStorage(tmp_path)
    with pytest.raises(ConnectionError):
        await storage.write("files/x", broken())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_unknown_kind_of_storage_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        open_storage("ftp://x/y", "default")
