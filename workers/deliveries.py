"""What kombu does between Redis' list and a task, made to bear a full Redis, a failover, and garbage in the list.

A stock Celery worker exits at each of them. Nothing may be lost by going on: the ledger finds whatever message is.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import virtual
from kombu.transport.redis import Channel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

log = logging.getLogger(__name__)
kept_here: Any = virtual.QoS.append


def harden(channel: Any) -> None:
    """Wrap the consumer's channel; each reconnect makes a new one."""
    if not isinstance(channel, Channel):
        return
    redis_channel: Any = channel  # kombu has no types
    book, read = redis_channel.qos.append, redis_channel.handlers["BRPOP"]

    def append(message: Any, delivery_tag: str) -> None:
        try:
            book(message, delivery_tag)
        except ResponseError as error:  # full: its book of unacked messages can't be written, and isn't needed
            log.warning("Redis does not take the record of a delivery (%s)", type(error).__name__)
            kept_here(redis_channel.qos, message, delivery_tag)

    def brpop_read(**options: Any) -> Any:
        try:
            return read(**options)
        except ReadOnlyError as error:
            raise RedisConnectionError("this Redis has become a replica") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("Dropped a message that is none: %s", type(error).__name__)
            return True

    redis_channel.qos.append = append
    redis_channel.handlers["BRPOP"] = brpop_read
