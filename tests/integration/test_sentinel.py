"""sentinel:// URLs against a real Sentinel, from both libraries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.processes import free_port, wait_until
from tests.servers import running_server
from tokenfleet.wire import urls
from tokenfleet.workers import lifeline
from tokenfleet.workers.embedded_server import find_binary


@pytest.fixture
def sentinel_url(tmp_path: Path) -> Iterator[str]:
    """Of a master "main", database 1, and one sentinel that watches it."""
    master_port, port = free_port(), free_port()
    with running_server(port=str(master_port), bind="127.0.0.1") as master:
        password = urls.parse(master.url).password
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {master_port} 1\n"
            f"sentinel auth-pass main {password}\n"
        )
        with (tmp_path / "log").open("wb") as log:
            sentinel = lifeline.spawn([find_binary(), str(config), "--sentinel"], output=log)
        try:
            with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
                wait_until(lambda: is_watching(client))
                assert client.info("server")["process_id"] == sentinel.pid
            yield f"sentinel://:{password}@127.0.0.1:{port}/1?master_name=main"
        finally:
            sentinel.kill()


def is_watching(client: redis.Redis) -> bool:
    try:
        return bool(client.info("sentinel")["master0"]["status"] == "ok")
    except (redis.ConnectionError, KeyError):
        return False


async def test_redis_py_finds_the_master_through_the_sentinel(sentinel_url: str) -> None:
    with urls.connect(sentinel_url) as client:
        client.set("k", "v")
        assert client.client_info()["db"] == 1
    async with urls.connect_async(sentinel_url) as client:
        assert await client.get("k") == b"v"


async def test_calls_at_once_lose_no_sentinel(sentinel_url: str) -> None:
    """The first one named is dead; it may be the one that lives when the other dies."""
    dead = free_port()
    both = sentinel_url.replace("@", f"@127.0.0.1:{dead},")
    async with urls.connect_async(both) as client:
        assert await asyncio.gather(*(client.get("k") for _ in range(20))) == [None] * 20
        assert ports_of(client.connection_pool) == tuple(sorted((dead, urls.parse(sentinel_url).hosts[0][1])))
    with urls.connect(both) as client, ThreadPoolExecutor(10) as threads:
        assert list(threads.map(client.get, ["k"] * 20)) == [None] * 20
        assert ports_of(client.connection_pool) == tuple(sorted((dead, urls.parse(sentinel_url).hosts[0][1])))


async def test_who_finds_a_new_master_leaves_others_questions_alone(sentinel_url: str) -> None:
    async with urls.connect_async(sentinel_url) as client:
        await asyncio.gather(*(client.get("k") for _ in range(5)))  # connections that a new master makes idle
        pool = client.connection_pool
        for _ in range(20):
            pool.master_address = ("127.0.0.1", 1)  # the old one's
            finds = asyncio.create_task(pool.get_master_address())
            others = []
            while not finds.done():
                others.append(asyncio.create_task(pool.sentinel_manager.discover_master("main")))
                await asyncio.sleep(0)
            assert len(set(await asyncio.gather(finds, *others))) == 1
            await asyncio.gather(*(client.get("k") for _ in range(5)))


def ports_of(pool: Any) -> tuple[int, ...]:
    nodes = pool.sentinel_manager.sentinels
    return tuple(sorted(node.connection_pool.connection_kwargs["port"] for node in nodes))


def test_celerys_transport_finds_it_too(sentinel_url: str) -> None:
    options = urls.parse(sentinel_url).celery_transport_options()
    connection = Connection(urls.to_celery(sentinel_url), transport_options=options)
    with connection, connection.SimpleQueue("q") as queue:
        queue.put({"job": 1})
        message = queue.get(timeout=30)
        message.ack()
        assert message.payload == {"job": 1}
    with urls.connect(sentinel_url) as client:
        assert client.smembers("_kombu.binding.q")
