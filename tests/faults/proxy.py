"""A TCP proxy between a worker (or client) and Redis that can be told to fail the way networks do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tests.servers import RedisServer


class Proxy:
    """``url`` leads to ``server`` through this proxy. All methods may be called from any thread."""

    def __init__(self, server: RedisServer) -> None:
        self._socket: Path = server.server.socket
        self._password = server.server._password
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._passing: asyncio.Event
        self._writers: set[asyncio.StreamWriter] = set()
        self._refusing = False
        self._replies_to_lose = 0
        self.lost_replies = 0
        self.drop_messages_with = b""
        """Pub/sub messages that hold this vanish on the way."""
        self.dropped_messages = 0
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    @property
    def url(self) -> str:
        return f"redis://:{quote(self._password)}@127.0.0.1:{self._port}/0"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @contextlib.contextmanager
    def partition(self) -> Iterator[None]:
        """Within the block nothing gets through in either direction, and nobody is told. Then all of it arrives."""
        self._loop.call_soon_threadsafe(self._passing.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._passing.set)

    @contextlib.contextmanager
    def refusal(self) -> Iterator[None]:
        """Within the block all connections are reset, and new ones at once."""
        self._refusing = True
        self.cut()
        try:
            yield
        finally:
            self._refusing = False

    def cut(self) -> None:
        """Reset all connections."""
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._writers])

    def lose_replies(self, count: int) -> None:
        """The next ``count`` replies are lost with their connections: Redis has done what it was asked."""
        self._replies_to_lose = count

    async def _listen(self) -> None:
        self._passing = asyncio.Event()
        self._passing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the loop's next round

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = {writer}
        self._writers.add(writer)
        try:
            if self._refusing:
                return
            to_redis, from_client = await asyncio.open_unix_connection(str(self._socket), limit=1 << 14)
            pair.add(from_client)
            self._writers.add(from_client)
            await asyncio.gather(self._pump(reader, from_client), self._pump(to_redis, writer, is_reply=True))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers -= pair
            for each in pair:
                each.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_reply: bool = False
    ) -> None:
        while data := await source.read(1 << 16):
            await self._passing.wait()
            # Subscriptions and blocking pops are answered unasked; only EVALSHA's replies are worth losing.
            if is_reply and self._replies_to_lose and data[:1] in b"*+:$" and not _is_pushed(data):
                self._replies_to_lose -= 1
                self.lost_replies += 1
                raise ConnectionResetError
            if is_reply and self.drop_messages_with and b"message" in data[:20] and self.drop_messages_with in data:
                self.dropped_messages += 1
                continue
            target.write(data)
            await target.drain()
        raise ConnectionResetError


def _is_pushed(data: bytes) -> bool:
    return any(word in data[:40] for word in (b"message", b"subscribe", b"OK", b"PONG"))


@contextlib.contextmanager
def proxied(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server)
    try:
        yield proxy
    finally:
        proxy.close()
