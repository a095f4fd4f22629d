"""The collector: log and channel of many jobs, read over one multiplexed connection, as ordered events.

The log is the truth, the channel a hint: a follower subscribes first, then reads the log from its cursor, then follows
live; it drops what it has seen, and fills any gap from the log. A lost *last* message shows no gap, so once a second
one call asks for state and last event of all silent jobs, and does the fleet's housekeeping: whoever watches a job may
end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from tokenfleet.wire.errors import FleetUnavailable, LostState
from tokenfleet.wire.events import TERMINAL, AnyEvent
from tokenfleet.wire.ledger import Ledger, unknown

log = logging.getLogger(__name__)

BUFFER_EVENTS = 1024
SILENCE_S = 1.0
PATIENCE_S = 60.0


class _Live(msgspec.Struct):
    seq: int
    events: list[AnyEvent]


_live_decoder = msgspec.json.Decoder(_Live)


class Follower:
    """One reader of one job, from a cursor on. Read it with `next_batch` until it returns the terminal event.

    A reader slower than the job costs no memory: beyond ``BUFFER_EVENTS`` it falls back to reading the log."""

    def __init__(self, ledger: Ledger, job_id: str, after: int) -> None:
        self.job_id = job_id
        self.cursor = after
        self._ledger = ledger
        self._live: deque[tuple[int, list[AnyEvent]]] = deque()
        self._buffered = 0
        self._wake = asyncio.Event()
        self._read_log = True
        self._seen = after > 0
        self._last: AnyEvent | None = None  # the event at the cursor; a cursor that came from elsewhere proves nothing
        self._error: Exception | None = None
        self.heard_s = time.monotonic()

    async def next_batch(self) -> list[tuple[int, AnyEvent]]:
        """Wait for new events: at least one (seq, event), in order, without gap or repeat.

        Raises `UnknownJob`, `LostState`, or `FleetUnavailable` when Redis stays away."""
        while True:
            if self._error:
                if isinstance(self._error, LostState) and self._last is not None:
                    with contextlib.suppress(RedisError, OSError):
                        await self._ledger.lost(self.job_id, self.cursor)
                raise self._error
            if (batch := self._from_live()) or (self._read_log and (batch := await self._from_log())):
                self.cursor, self._last = batch[-1]
                self._seen = True
                return batch
            if not self._read_log and not self._live and self._error is None:
                self._wake.clear()
                await self._wake.wait()

    def hear(self, seq: int, events: list[AnyEvent]) -> None:
        """The collector's own call, with what came on the channel."""
        self.heard_s = time.monotonic()
        if self._buffered > BUFFER_EVENTS:
            self._live.clear()
            self._buffered = 0
            self._read_log = True
        else:
            self._live.append((seq, events))
            self._buffered += len(events)
        self._wake.set()

    def told_of(self, last_seq: int) -> None:
        """The collector's own call: the log has, or will have, events up to this one."""
        self.heard_s = time.monotonic()
        if last_seq > self.cursor:
            self._read_log = True
            self._wake.set()

    def check(self, last_seq: int | None, asked_at: int | None = None) -> None:
        """The collector's own call, with the job's last event by the ledger; None if the job is gone.

        ``asked_at``: the cursor when the ledger was asked. What has come since is no sign of a loss."""
        asked_at = self.cursor if asked_at is None else asked_at
        if last_seq is None:
            self.fail(
                LostState(
                    f"Job {self.job_id} vanished before it ended.", hint="Redis came back without it; submit again."
                )
                if self._seen
                else unknown(self.job_id)
            )
        elif last_seq < asked_at:
            self.fail(LostState(f"Redis lost the end of job {self.job_id}: {last_seq} events, {asked_at} were read."))
        elif last_seq > self.cursor:
            self._read_log = True
            self._wake.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()

    def _from_live(self) -> list[tuple[int, AnyEvent]]:
        batch: list[tuple[int, AnyEvent]] = []
        expected = self.cursor + 1
        while self._live:
            seq, events = self._live[0]
            if seq > expected:
                if not batch:
                    self._read_log = True  # a gap: the log has what is missing
                break
            self._live.popleft()
            self._buffered -= len(events)
            for event in events[expected - seq :]:
                batch.append((expected, event))
                expected += 1
        return batch

    async def _from_log(self) -> list[tuple[int, AnyEvent]]:
        self._read_log = False
        has_gap = bool(self._live) and self._live[0][0] > self.cursor + 1
        events = await self._patiently()
        if not events:
            if has_gap:  # durable first, live second: what was said live must be in the log, and isn't any more
                self.fail(LostState(f"Redis lost events of job {self.job_id} after {self.cursor}."))
            elif not self._live:
                self.check(await self._last_seq())
            return []
        first = events[0][0]
        if first != self.cursor + 1 or events[-1][0] != first + len(events) - 1:
            raise LostState(f"The log of job {self.job_id} has a gap after event {self.cursor}.")
        if len(events) == BUFFER_EVENTS:
            self._read_log = True
        return events

    async def _last_seq(self) -> int | None:
        try:
            polled = (await self._ledger.poll([self.job_id]))[0]
        except (RedisError, OSError):
            return self.cursor
        return polled.seq if polled else None

    async def _patiently(self) -> list[tuple[int, AnyEvent]]:
        """Read the log, waiting out an outage of Redis.

        Once more with the event at the cursor: a log that an outage cut may have grown again, with other text."""
        overlap = 0 if self._last is None else 1
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                events = await self._ledger.read(self.job_id, self.cursor - overlap, BUFFER_EVENTS + overlap)
                if overlap and events and events[0] != (self.cursor, self._last):
                    raise LostState(f"Redis lost what was read of job {self.job_id}: its log says something else now.")
                return events[overlap:]
            except (RedisError, OSError) as error:
                if time.monotonic() > until:
                    raise FleetUnavailable(
                        f"Redis has been away for {PATIENCE_S:.0f} s.", code="redis_unavailable"
                    ) from error
                await asyncio.sleep(0.2)


class Collector:
    """Follows any number of jobs. ``ledger`` has the connection for reading logs; one more is used for channels."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._prefix = ledger.keys.live("")
        self._followers: dict[str, set[Follower]] = {}
        self._confirmed: dict[str, asyncio.Future[None]] = {}
        self._pubsub: Any = ledger.client.pubsub()
        # redis-py's PubSub takes a connection for each of several first calls, and a closed one a new one: without
        # this, readers that begin while channels are being reconnected would drain the pool.
        self._subscribing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._changing: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        return self._changing | set(self._tasks)

    def fail_all(self, why: str = "This client is closed.") -> None:
        """Whoever still reads gets a `RuntimeError`: nobody would wake him any more."""
        for followers in self._followers.values():
            for follower in followers:
                follower.fail(RuntimeError(why))

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:  # a bug: no reason to wait for ever
            log.error("the collector has ended", exc_info=error)
            for other in self._tasks:
                other.cancel()
            self._tasks = []  # the next reader has new ones
            self.fail_all(f"The collector met a bug: {type(error).__name__}.")

    async def close(self) -> None:
        self.fail_all()
        await asyncio.gather(*self._changing, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pubsub.aclose()

    @asynccontextmanager
    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Follower]:
        """A follower that gets every event after the cursor ``after``. Leaving the block unsubscribes."""
        follower = Follower(self._ledger, job_id, after)
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]
            for task in self._tasks:
                task.add_done_callback(self._has_ended)
        if job_id not in self._followers:
            self._followers[job_id] = set()
            self._confirmed[job_id] = asyncio.get_running_loop().create_future()
            self._change(self._subscribe(job_id))
        self._followers[job_id].add(follower)
        try:
            await self._begun(job_id)
            yield follower
        finally:
            self._leave(job_id, follower)

    async def _begun(self, job_id: str) -> None:
        try:
            # Reading the log before the subscription stands could miss an event; but don't wait for ever.
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes as the future is done.
            async with asyncio.timeout(5.0):
                await asyncio.shield(self._confirmed[job_id])
        except TimeoutError:
            log.info("job %s: no live events yet; reading its log", job_id)

    def _leave(self, job_id: str, follower: Follower) -> None:
        """Without awaiting anything: whoever leaves may have been cancelled, and cancelled again at each await."""
        followers = self._followers[job_id]
        followers.discard(follower)
        if not followers:
            del self._followers[job_id]
            self._confirmed.pop(job_id).cancel()
            self._change(self._unsubscribe(job_id))

    def _change(self, change: Coroutine[Any, Any, None]) -> None:
        """In a task of its own: the reader for whom it is made may go, and others read the same job."""
        task = asyncio.create_task(change)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    async def _subscribe(self, job_id: str) -> None:
        # While Redis is away the listener subscribes to all that there is once it is back.
        with contextlib.suppress(RedisError, OSError):
            async with self._subscribing:
                if job_id in self._followers:  # else they have left already
                    await self._pubsub.subscribe(self._prefix + job_id)
        self._changed.set()

    async def _unsubscribe(self, job_id: str) -> None:
        async with self._subscribing:
            if job_id not in self._followers:  # else somebody came back meanwhile
                with contextlib.suppress(RedisError, OSError):
                    await self._pubsub.unsubscribe(self._prefix + job_id)

    async def _listen(self) -> None:
        """Hand what the channels say to the followers, until cancelled; reconnects by itself."""
        await self._changed.wait()  # the first subscription makes the connection
        while True:
            if not self._followers:
                self._changed.clear()
                await self._changed.wait()
            try:
                if self._pubsub.connection is None:  # the first subscription met a Redis that was away
                    raise RedisConnectionError
                message = await self._pubsub.get_message(timeout=SILENCE_S)
                if message is not None:
                    self._dispatch(message["type"], message["channel"], message["data"])
                    await self._dispatch_buffered()
            except (RedisError, OSError) as error:
                log.info("channels: %s; reconnecting", type(error).__name__)
                await asyncio.sleep(0.2)
                await self._resubscribe()

    async def _dispatch_buffered(self) -> None:
        """What came with that message: redis-py's way to one takes longer than all the rest of a message's here."""
        parser = getattr(self._pubsub.connection, "_parser", None)
        reader = getattr(parser, "_reader", None)  # hiredis'; without it they come one by one
        if reader is None:
            return
        while isinstance(reply := reader.gets(False), list):
            if reply[0] == b"message":
                self._dispatch("message", reply[1], reply[2])
            elif (message := await self._pubsub.handle_message(reply)) is not None:
                self._dispatch(message["type"], message["channel"], message["data"])
        if isinstance(reply, Exception):
            raise reply
        await asyncio.sleep(0)  # redis-py does not yield while there is more: readers come first

    async def _resubscribe(self) -> None:
        async with self._subscribing:
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.aclose()
            self._pubsub = self._ledger.client.pubsub()
            if self._followers:
                with contextlib.suppress(RedisError, OSError):
                    await self._pubsub.subscribe(*(self._prefix + job_id for job_id in self._followers))
        for followers in self._followers.values():
            for follower in followers:
                follower.check(follower.cursor + 1)  # whatever was said meanwhile is in the log

    def _dispatch(self, kind: str, channel: bytes, data: Any) -> None:
        job_id = channel.decode().removeprefix(self._prefix)
        followers = self._followers.get(job_id)
        if followers is None:
            return
        if kind == "subscribe":
            confirmed = self._confirmed[job_id]
            if not confirmed.done():
                confirmed.set_result(None)
        elif kind == "message":
            try:
                live = _live_decoder.decode(data)
            except msgspec.DecodeError:
                log.warning("job %s: dropped a message that is no event", job_id)
                return
            for follower in followers:
                if self._ledger.replicas:  # said before the replicas have it: only a reason to read the log
                    follower.told_of(live.seq + len(live.events) - 1)
                else:
                    follower.hear(live.seq, live.events)

    async def _watch(self) -> None:
        """Once a second: ask for all silent jobs, and do the fleet's housekeeping."""
        while True:
            await asyncio.sleep(SILENCE_S)
            limit = time.monotonic() - SILENCE_S
            if not any(follower.heard_s < limit for fs in self._followers.values() for follower in fs):
                continue
            with contextlib.suppress(RedisError, OSError):
                await self._ledger.reap()
                silent = {
                    job_id: [(follower, follower.cursor) for follower in fs]
                    for job_id, fs in self._followers.items()
                    if any(follower.heard_s < limit for follower in fs)
                }
                polled = await self._ledger.poll(list(silent))
                for asked, state in zip(silent.values(), polled, strict=True):
                    for follower, cursor in asked:
                        follower.check(state.seq if state else None, cursor)


def is_terminal(event: AnyEvent) -> bool:
    return isinstance(event, TERMINAL)
