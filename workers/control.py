"""The control channel: orders to one worker, as hints; the ledger has decided before they are sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import redis.asyncio
from redis.exceptions import RedisError

from tokenfleet.wire.keys import Keys

log = logging.getLogger(__name__)


class ControlChannel:
    """``on_order(order, argument)`` is called on the loop for ``cancel <job>``, ``ask <nonce>`` and ``fenced``."""

    def __init__(
        self,
        connect: Callable[[], redis.asyncio.Redis],
        keys: Keys,
        worker_id: Callable[[], str],
        on_order: Callable[[str, str], None],
    ) -> None:
        self._connect = connect
        self._keys = keys
        self._worker_id = worker_id
        self._on_order = on_order

    async def run(self) -> None:
        """Listen until cancelled; reconnects by itself."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                log.info("control channel: %s; reconnecting", type(error).__name__)
                await asyncio.sleep(0.2)

    async def _listen(self) -> None:
        """Until the worker's id changes (a lapsed lease) or the connection breaks."""
        worker_id = self._worker_id()
        client = self._connect()
        try:
            async with client.pubsub() as pubsub:
                await pubsub.subscribe(self._keys.control(worker_id))
                while self._worker_id() == worker_id:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
                    if message is not None:
                        order, _, argument = message["data"].decode(errors="replace").partition(" ")
                        self._on_order(order, argument)
        finally:
            await client.aclose()
