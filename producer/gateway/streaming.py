"""Server-sent events out of jobs' logs: ``id:`` = the log's seq, so any gateway can resume any stream.

    return await event_stream(request, [Source(job, chunks.frame)], tail=DONE)

A job that is refused by its worker (an over-long prompt, a parameter its engine hasn't) is refused with an HTTP status:
the answer's head is held back until a worker has begun, or for a few seconds. While nothing comes, comments keep
proxies from closing the connection. A client that leaves closes the jobs' streams, which cancels those that are to end
with their reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request, Response

from tokenfleet.producer.aio_job import AsyncJob, AsyncStream, raise_for
from tokenfleet.producer.collector import is_terminal
from tokenfleet.producer.gateway.errors import error_object
from tokenfleet.producer.gateway.metrics import Observed
from tokenfleet.wire.errors import InvalidRequest, JobCancelled, TokenfleetError
from tokenfleet.wire.events import AnyEvent, Delta, Started

DONE = b"data: [DONE]\n\n"
_SLICE_S = 0.5

Batch = list[tuple[int, AnyEvent]]


@dataclass(slots=True)
class Source:
    """A job to be streamed. ``frame`` makes the bytes for each event of its log, from the first on."""

    job: AsyncJob
    frame: Callable[[int, AnyEvent], bytes]
    observed: Observed


def last_event_id(request: Request) -> int:
    """Where a broken stream is to go on. Raises `InvalidRequest`."""
    last = request.headers.get("last-event-id", "0")
    if not last.isascii() or not last.isdecimal() or len(last) > 15:
        raise InvalidRequest("Last-Event-ID: the id of an event of this stream is needed.", param="Last-Event-ID")
    return int(last)


async def event_stream(
    request: Request, sources: list[Source], *, tail: bytes = DONE, is_held: bool = True,
    on_error: Callable[[TokenfleetError], bytes] | None = None,
) -> Response:  # fmt: skip
    """The answer that streams ``sources`` (side by side, if several). Raises a job's error as long as its head
    ``is_held``."""
    settings = request.app.state.settings
    reader = _Reader(sources, on_error or _error_frame, settings.keepalive_s)
    until = time.monotonic() + settings.head_held_s
    try:
        while is_held and not reader.has_begun and (left := until - time.monotonic()) > 0:
            await reader.read(min(left, _SLICE_S))
            if await request.is_disconnected():
                raise JobCancelled("The client left.")
        if reader.error is not None and not reader.has_tokens:
            raise reader.error
    except BaseException:
        await reader.aclose()
        raise
    return _EventResponse(reader, tail)


def _error_frame(error: TokenfleetError) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode({"error": error_object(error)})


class _Reader:
    """The bytes of all sources. Until the first token each read is a task, so that waiting has an end; then it isn't:
    a task a batch would be most of a busy gateway's work."""

    def __init__(self, sources: list[Source], on_error: Callable[[TokenfleetError], bytes], keepalive_s: float) -> None:
        self._sources = sources
        self._streams: list[AsyncStream] = [source.job.stream() for source in sources]
        self._reading: dict[asyncio.Task[Batch], int] = {}
        self._on_error = on_error
        self._keepalive_s = keepalive_s
        self._wrote_s = time.monotonic()
        self._out = bytearray()
        self._open = len(sources)
        self.has_begun = False
        """A worker has begun (or the job has ended)."""
        self.has_tokens = False
        self.error: TokenfleetError | None = None

    async def read(self, timeout_s: float | None) -> None:
        """Take in what is there, waiting no longer than that."""
        if not self._reading:
            for at in range(len(self._streams)):
                self._start(at)
        done, _ = await asyncio.wait(self._reading, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            at = self._reading.pop(task)
            if await self._took(at, task):
                self._start(at)

    async def _took(self, at: int, batch: Awaitable[Batch]) -> bool:
        """Take in a batch; whether there is more to come from that source."""
        try:
            return self._take(at, await batch)
        except TokenfleetError as error:
            self.error, self._open, self.has_begun = error, 0, True
            return False

    def _start(self, at: int) -> None:
        self._reading[asyncio.ensure_future(self._streams[at].next_batch())] = at

    def _take(self, at: int, batch: Batch) -> bool:
        source = self._sources[at]
        source.observed.batch(batch)
        for seq, event in batch:
            self._out += source.frame(seq, event)
            if isinstance(event, Delta):
                self.has_begun = self.has_tokens = True
            elif isinstance(event, Started):
                self.has_begun = True
        if not is_terminal(batch[-1][1]):
            return True
        self.has_begun = True
        self._open -= 1
        raise_for(batch[-1][1])
        return False

    async def write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """All there is to send, from now to the end; all that came together in one piece."""
        pulse = asyncio.ensure_future(self._pulse(write))
        try:
            await self._write(write)
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)

    async def _pulse(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """A comment whenever nothing was sent for so long: before the first token, while a worker takes over, while a
        tool call is written that is shown whole. Proxies between cut what is silent."""
        while True:
            silent_s = time.monotonic() - self._wrote_s
            if silent_s >= self._keepalive_s:
                self._wrote_s = time.monotonic()
                # No blank line after it: OpenAI's client would take that for the end of an event without data.
                await write(b": waiting\n")
            else:
                await asyncio.sleep(self._keepalive_s - silent_s)

    async def _write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            if self.error is not None:
                self._out += self._on_error(self.error)
            if self._out:
                piece = bytes(self._out)
                self._out.clear()
                self._wrote_s = time.monotonic()
                await write(piece)
            if not self._open:
                return
            if self.has_tokens and len(self._streams) == 1:
                task = self._reading.popitem()[0] if self._reading else None
                await self._took(0, task or self._streams[0].next_batch())
                continue
            await self.read(None)

    async def aclose(self) -> None:
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        for stream in self._streams:
            with contextlib.suppress(TokenfleetError):
                await stream.aclose()
        for source in self._sources:
            source.observed.close()


class _EventResponse(Response):
    """Sends what a reader has, until it ends or the client leaves; closes the reader whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, reader: _Reader, tail: bytes) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._reader = reader
        self._tail = tail

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._reader.aclose()

    async def _write(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._reader.write(lambda piece: send({"type": "http.response.body", "body": piece, "more_body": True}))
        await send({"type": "http.response.body", "body": self._tail, "more_body": False})


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
