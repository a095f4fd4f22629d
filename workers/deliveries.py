"""What kombu does between Redis' list and a task, made to bear a full Redis, a failover, and garbage in the list, and
to hand jobs on without waiting for its own book.

A stock Celery worker exits at each of them. Nothing may be lost by going on: the ledger finds whatever message is.
"""

from __future__ import annotations

import logging
from time import time
from typing import Any

from kombu.transport import virtual
from kombu.transport.redis import Channel
from kombu.utils import json
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

log = logging.getLogger(__name__)
kept_here: Any = virtual.QoS.append
acked_here: Any = virtual.QoS.ack
dumps: Any = json.dumps

LEDGER_TASK = "tokenfleet.run"
"""Its message names a job and holds nothing: the ledger sends it again if it is lost."""
BOOKED_AFTER_S = 0.02


def harden(channel: Any, hub: Any) -> None:
    """Wrap the consumer's channel; each reconnect makes a new one. ``hub``: Celery's, on whose thread all this is."""
    if not isinstance(channel, Channel):
        return
    redis_channel: Any = channel  # kombu has no types
    read = redis_channel.handlers["BRPOP"]

    def brpop_read(**options: Any) -> Any:
        try:
            return read(**options)
        except ReadOnlyError as error:
            raise RedisConnectionError("this Redis has become a replica") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("Dropped a message that is none: %s", type(error).__name__)
            return True

    redis_channel.handlers["BRPOP"] = brpop_read
    LateBook(redis_channel.qos, hub)


class LateBook:
    """Takes the place of kombu's book of unacknowledged messages, in Redis, for one channel.

    kombu writes each message into it, and waits for the answer, before a task sees it: two thirds of what a message
    took of the worker's main thread, so that eight jobs sent at once reached the engine 4 ms after one another. Jobs'
    own messages are written down together, up to `BOOKED_AFTER_S` later, and not at all if they are acked by then.
    Until then a killed worker loses them, as kombu's own would between pop and book. Other tasks' messages may be all
    there is of them, and are written down at once."""

    def __init__(self, qos: Any, hub: Any) -> None:
        self._qos, self._hub = qos, hub
        self._book, self._ack, self._reject, self._restore = qos.append, qos.ack, qos.reject, qos.restore_unacked
        self._unbooked: dict[str, Any] = {}
        qos.append, qos.ack, qos.reject, qos.restore_unacked = self.append, self.ack, self.reject, self.restore_unacked

    def append(self, message: Any, tag: str) -> None:
        if (message.headers or {}).get("task") == LEDGER_TASK:
            kept_here(self._qos, message, tag)
            if not self._unbooked:
                self._hub.call_later(BOOKED_AFTER_S, self.write)
            self._unbooked[tag] = message
            return
        try:
            self._book(message, tag)
        except ResponseError as error:  # full: the book can't be written, and isn't needed
            log.warning("Redis does not take the record of a delivery (%s)", type(error).__name__)
            kept_here(self._qos, message, tag)

    def write(self) -> None:
        """Never raises: without its record a message is lost only together with this worker, and then sent again."""
        unbooked, self._unbooked = self._unbooked, {}
        if not unbooked:
            return
        qos, now = self._qos, time()
        where = {tag: message.delivery_info for tag, message in unbooked.items()}
        records = {
            tag: dumps([message._raw, where[tag]["exchange"], where[tag]["routing_key"]])
            for tag, message in unbooked.items()
        }
        try:
            with qos.pipe_or_acquire() as pipe:
                pipe.zadd(qos.unacked_index_key, dict.fromkeys(records, now))
                pipe.hset(qos.unacked_key, mapping=records)
                pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("Redis does not take the record of %d deliveries (%s)", len(records), type(error).__name__)

    def ack(self, tag: str) -> None:
        if self._unbooked.pop(tag, None) is None:
            self._ack(tag)
        else:
            acked_here(self._qos, tag)

    def reject(self, tag: str, requeue: bool = False) -> None:
        self.write()  # what is put back is read from the book
        self._reject(tag, requeue)

    def restore_unacked(self, *args: Any, **kwargs: Any) -> Any:
        self.write()
        return self._restore(*args, **kwargs)
