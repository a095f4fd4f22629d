"""The publisher: one batch in flight for all running jobs of a worker.

Whatever accumulates while a batch is on its way goes out in the next one. So an idle fleet adds almost no latency, and
a loaded one coalesces by itself: adjacent tokens of a choice become one delta, and all jobs share one script call.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec
from redis.exceptions import RedisError

from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, TokenLogprob, encode
from tokenfleet.wire.jobs import State
from tokenfleet.wire.ledger import AppendStatus, Batch, Claim, Ledger

log = logging.getLogger(__name__)

MAX_EVENTS = 256
MAX_BYTES = 256 * 1024
BUSY_EVENTS = 4
BUSY_PAUSE_S = 0.002
"""After a batch of so many events the next one gathers a little longer. A quick Redis is done within a millisecond, and
would else be asked once for every few tokens."""
Lost = Literal["fenced", "ended", "gone", "gap"]


class _OpenDelta:
    """A delta that still grows: it has not been sent."""

    __slots__ = ("choice", "ids", "index", "logprobs", "texts")

    def __init__(self, delta: Delta) -> None:
        self.choice, self.index = delta.choice, delta.index
        self.ids, self.texts, self.logprobs = list(delta.ids), [delta.text], list[TokenLogprob](delta.logprobs)

    def closed(self) -> Delta:
        return Delta(self.choice, self.index, tuple(self.ids), "".join(self.texts), tuple(self.logprobs))


class JobWriter:
    """One attempt's way into its job's log. `put` never blocks; what is put is bounded by the job's max_tokens.

    ``on_lost`` is called once, when the job turns out to be someone else's, ended or gone: nothing more gets out."""

    def __init__(self, publisher: Publisher, claim: Claim, on_lost: Callable[[Lost], None]) -> None:
        self.claim = claim
        self.seq = claim.seq
        self.tokens = claim.tokens
        self.lost: Lost | None = None
        self._publisher = publisher
        self._on_lost = on_lost
        self._pending: deque[AnyEvent | _OpenDelta] = deque()
        self._open: dict[int, _OpenDelta] = {}
        self._fields: dict[str, str | bytes] = {}
        self._final: tuple[State, bytes] | None = None
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._in_flight: Batch | None = None

    def put(self, event: AnyEvent, fields: dict[str, str | bytes] | None = None) -> None:
        """Queue an event; ``fields`` are stored in the ledger by the same script call."""
        if self.lost:
            return
        if isinstance(event, Delta):
            if (open_delta := self._open.get(event.choice)) is not None:
                open_delta.ids += event.ids
                open_delta.texts.append(event.text)
                open_delta.logprobs += event.logprobs
            else:
                self._open[event.choice] = open_delta = _OpenDelta(event)
                self._pending.append(open_delta)
            self.tokens += len(event.ids)
        else:
            if isinstance(event, ChoiceFinished):
                self._open.pop(event.choice, None)
            self._pending.append(event)
        if fields:
            self._fields |= fields
        self._flushed.clear()
        self._publisher.mark(self)

    def finish(self, state: State, event: AnyEvent, celery_meta: bytes) -> None:
        """Queue the terminal event."""
        self._final = (state, celery_meta)
        self.put(event)

    async def flushed(self) -> None:
        """Wait until all that was put is stored (or the job is lost to this attempt)."""
        await self._flushed.wait()

    def take(self, room: int) -> Batch | None:
        """Up to ``room`` events as one batch. The publisher's own call."""
        events: list[bytes] = []
        size = 0
        while self._pending and len(events) < room and size < MAX_BYTES:
            event = self._pending.popleft()
            if isinstance(event, _OpenDelta):
                if self._open.get(event.choice) is event:
                    del self._open[event.choice]
                event = event.closed()
            events.append(encode(event))
            size += len(events[-1])
        if not events:
            return None
        final: State | Literal[""] = ""
        meta = b""
        if self._final and not self._pending:
            final, meta = self._final
        fields, self._fields = self._fields, {}
        # While the rest is still pending, its tokens are not delivered yet: count only what goes out now.
        rest = sum(len(e.ids) for e in self._pending if isinstance(e, _OpenDelta))
        claim = self.claim
        self._in_flight = Batch(
            claim.job_id, claim.epoch, claim.owner, self.seq + 1, self.tokens - rest, events, fields, final, meta
        )  # fmt: skip
        return self._in_flight

    def acknowledge(self, status: AppendStatus) -> None:
        """The publisher's own call, with what became of the batch it took."""
        batch, self._in_flight = self._in_flight, None
        assert batch is not None
        if status == "ok":
            self.seq += len(batch.events)
            if self._pending:
                self._publisher.mark(self)
            else:
                self._flushed.set()
        else:
            self.lose(status)

    def lose(self, status: Lost) -> None:
        """Nothing more of this attempt may become visible."""
        if self.lost is None:
            self.lost = status
            self._pending.clear()
            self._open.clear()
            self._flushed.set()
            self._on_lost(status)


class Publisher:
    """Owns the one connection on which a worker's events leave. Run `run` as a task of the worker's loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._dirty: dict[JobWriter, None] = {}
        self._wake = asyncio.Event()
        self.calls = 0
        self.events = 0

    def open(self, claim: Claim, on_lost: Callable[[Lost], None]) -> JobWriter:
        return JobWriter(self, claim, on_lost)

    def mark(self, writer: JobWriter) -> None:
        """The writer's own call: it has something to send."""
        self._dirty[writer] = None
        self._wake.set()

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                if await self._send_one_batch() >= BUSY_EVENTS:
                    await asyncio.sleep(BUSY_PAUSE_S)

    async def aclose(self) -> None:
        await self._ledger.client.aclose()

    async def _send_one_batch(self) -> int:
        """How many events went out."""
        writers: list[JobWriter] = []
        batches: list[Batch] = []
        events = size = 0
        while self._dirty and events < MAX_EVENTS and size < MAX_BYTES:
            writer = next(iter(self._dirty))
            del self._dirty[writer]
            if (batch := writer.take(MAX_EVENTS - events)) is not None:
                writers.append(writer)
                batches.append(batch)
                events += len(batch.events)
                size += sum(map(len, batch.events))
        if not batches:
            return 0
        for writer, status in zip(writers, await self._append(batches), strict=True):
            writer.acknowledge(status)
        self.calls += 1
        self.events += events
        return events

    async def _append(self, batches: list[Batch]) -> list[AppendStatus]:
        """Append, again and again while Redis is away: the script knows a batch that it has already written."""
        pause_s = 0.05
        while True:
            try:
                return await self._ledger.append(batches)
            except (RedisError, OSError) as error:
                if pause_s == 0.05:
                    log.warning("Redis does not take events (%s); trying until it does", type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(1.0, pause_s * 2)


def celery_success(job_id: str, result: object) -> bytes:
    """What ``AsyncResult(job_id)`` reads of a job that finished."""
    return msgspec.json.encode(
        {"status": "SUCCESS", "result": result, "traceback": None, "children": [], "date_done": None, "task_id": job_id}
    )


def celery_failure(job_id: str, exc_type: str, message: str) -> bytes:
    """What ``AsyncResult(job_id)`` reads of a job that failed: `get` raises ``tokenfleet.wire.errors.<exc_type>``."""
    body = {"exc_type": exc_type, "exc_message": [message], "exc_module": "tokenfleet.wire.errors"}
    return msgspec.json.encode(
        {"status": "FAILURE", "result": body, "traceback": None, "children": [], "date_done": None, "task_id": job_id}
    )
