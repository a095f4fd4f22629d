"""Connections of ``redis.asyncio`` that can be cancelled at any moment.

redis-py bounds each write with `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes just as
the write is done: the caller then goes on as if nobody had asked it to stop. `asyncio.timeout` does not, and needs no
task for each command either.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError


class Cancellable:
    """Mixed into a connection class of ``redis.asyncio``."""

    socket_timeout: float | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        limit_s, self.socket_timeout = self.socket_timeout, None  # redis-py's own bound stays out of it
        try:
            async with asyncio.timeout(limit_s):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError as error:
            raise RedisTimeoutError("Timeout writing to socket") from error
        except RuntimeError as error:  # uvloop's word for a connection that is gone; asyncio's own loop only logs it
            if "closed" not in str(error):
                raise
            raise RedisConnectionError("Connection closed while writing to socket") from error
        finally:
            self.socket_timeout = limit_s


def make_cancellable(client: Any) -> Any:
    """``client``, whose connections from now on are cancellable."""
    pool = client.connection_pool
    base = pool.connection_class
    if not issubclass(base, Cancellable):
        pool.connection_class = type(base.__name__, (Cancellable, base), {})
    return client
