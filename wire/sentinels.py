"""Clients that find their Redis through its sentinels; `tokenfleet.wire.urls.connect` and its twin are the way to them.

redis-py moves the sentinel that answered to the head of its list by an exchange. Of two calls at once, each exchanges
with what the other has moved already, and the list ends with one sentinel twice and another one gone: never asked
again when the first dies, its connections never closed. Here one call at a time asks, for all that wait.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import redis.asyncio.sentinel
import redis.sentinel
from redis.exceptions import ConnectionError as RedisConnectionError

from tokenfleet.wire.cancellable import make_cancellable

_Base: Any = redis.sentinel.Sentinel  # redis-py has no types for them
_AsyncBase: Any = redis.asyncio.sentinel.Sentinel

_TIMEOUTS: dict[str, Any] = {"socket_timeout": 3.0, "socket_connect_timeout": 3.0}
"""Of calls to a sentinel, in seconds: one behind a dead link must not hold up the way to the next."""


class _Sentinels(_Base):  # type: ignore[misc]
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._one_at_a_time = threading.Lock()

    def discover_master(self, service_name: str) -> tuple[str, int]:
        with self._one_at_a_time:
            found: tuple[str, int] = super().discover_master(service_name)
            return found


class _AsyncSentinels(_AsyncBase):  # type: ignore[misc]
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._asking: asyncio.Task[tuple[str, int]] | None = None

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Of the one master that this client is for: all who ask meanwhile get the same answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(super().discover_master(service_name))
            self._asking.add_done_callback(_seen)
        asking = self._asking
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            if asking.cancelled():  # not who asks, but the client was closed
                raise RedisConnectionError("This client was closed.") from None
            raise

    async def aclose(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        for node in self.sentinels:
            await node.aclose()


def _seen(asked: asyncio.Task[Any]) -> None:
    """Whoever wanted to know may have been cancelled: a failure that nobody asks for is not logged."""
    if not asked.cancelled():
        asked.exception()


def connect(hosts: list[tuple[str, int]], master_name: str, options: dict[str, Any]) -> Any:
    """A ``redis.Redis`` of the master; ``options`` are redis-py's own."""
    sentinels = _Sentinels(hosts, sentinel_kwargs=_TIMEOUTS)
    client = sentinels.master_for(master_name, **options)
    pool, disconnect = client.connection_pool, client.connection_pool.disconnect

    def disconnect_all(inuse_connections: bool = True) -> None:
        disconnect(inuse_connections=inuse_connections)
        if inuse_connections:  # it is closed; redis-py leaves those to the sentinels open
            for node in sentinels.sentinels:
                node.close()

    pool.disconnect = disconnect_all
    return client


def connect_async(hosts: list[tuple[str, int]], master_name: str, options: dict[str, Any]) -> Any:
    """A ``redis.asyncio.Redis`` of the master; see `connect`."""
    sentinels = _AsyncSentinels(hosts, sentinel_kwargs=_TIMEOUTS)
    client = sentinels.master_for(master_name, **options)
    pool, disconnect = client.connection_pool, client.connection_pool.disconnect

    async def disconnect_all(inuse_connections: bool = True) -> None:
        await disconnect(inuse_connections=inuse_connections)
        if inuse_connections:  # else only a new master was found, and others may be asking
            await sentinels.aclose()

    pool.disconnect = disconnect_all
    return make_cancellable(client)
