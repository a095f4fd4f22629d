"""Files' records and bytes go together: added, replaced by nothing, expired, swept."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RedisServer
from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.file_store import FileStore, StorageFull, StoredFile
from tokenfleet.producer.gateway.storage import FolderStorage
from tokenfleet.wire import urls
from tokenfleet.wire.keys import Keys


@pytest.fixture
async def redis(shared_redis: RedisServer) -> AsyncIterator[Any]:
    client = urls.connect_async(shared_redis.url)
    yield client
    await client.aclose()


@pytest.fixture
def store(redis: Any, shared_redis: RedisServer, tmp_path: Path) -> FileStore:
    return FileStore(redis, Keys(shared_redis.fleet), FolderStorage(tmp_path), quota_bytes=10)


async def add(
    store: FileStore, data: bytes, *, tenant: str = "t", ends_s: float = 60, is_free: bool = False
) -> StoredFile:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    file_id = f"file-{secrets.token_hex(16)}"
    name, size = await store.write(file_id, pieces())
    now = int(time.time())
    file = StoredFile(file_id, tenant, "x", "batch", size, now, name, expires_at=int(now + ends_s))
    return await store.add(file, is_free=is_free)


async def test_what_has_expired_is_gone_and_swept(store: FileStore, redis: Any, tmp_path: Path) -> None:
    old, kept = await add(store, b"old", ends_s=-1), await add(store, b"kept")
    with pytest.raises(NotFound):
        await store.get(old.id, "t")
    assert [file.id for file in await store.list("t")] == [kept.id]
    await store.sweep()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.object.partition("/")[2]]
    await store.delete(kept.id)
    await store.delete(kept.id)
    left = [key async for key in redis.scan_iter(f"{store._keys.prefix}*")]
    assert left == [], "no record, index or count outlives its file"


async def test_a_tenants_bytes_are_bounded_and_a_refused_file_leaves_none(store: FileStore, tmp_path: Path) -> None:
    first = await add(store, b"12345678")
    with pytest.raises(StorageFull):
        await add(store, b"123")
    assert len(list((tmp_path / "files").iterdir())) == 1
    await add(store, b"123", tenant="other")
    await add(store, b"what a batch wrote", is_free=True)
    await store.delete(first.id)
    with pytest.raises(StorageFull):  # a batch's output counts against what comes after it
        await add(store, b"123")


async def test_the_same_id_is_the_first_file(store: FileStore, tmp_path: Path) -> None:
    first = await add(store, b"one")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"two"

    name, size = await store.write(first.id, pieces())
    again = StoredFile(first.id, "t", "y", "batch", size, 0, name)
    assert await store.add(again) == first
    assert len(list((tmp_path / "files").iterdir())) == 1
    assert b"".join([piece async for piece in store.read(first)]) == b"one"


@pytest.mark.parametrize("file_id", ["", "file-", "file-" + "x" * 32, "../../etc/passwd", "file-" + "0" * 31 + "*"])
async def test_nothing_else_is_an_id(store: FileStore, file_id: str) -> None:
    with pytest.raises(NotFound):
        await store.get(file_id, "t")
