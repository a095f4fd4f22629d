"""Server-sent events out of a job's log: each carries ``id:`` = the log's seq, so any gateway can resume any stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse

from tokenfleet.producer.aio import AsyncJob, raise_for
from tokenfleet.producer.collector import is_terminal
from tokenfleet.producer.gateway.errors import error_object
from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.wire.events import AnyEvent

_encode = msgspec.json.Encoder().encode
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Feed = Callable[[AnyEvent], Iterator[dict[str, Any]]]


def sse(jobs: list[AsyncJob], feeds: list[Feed], after: int) -> StreamingResponse:
    """Stream the jobs' chunks, one job after the other. Resuming ``after`` a seq is offered for a single job."""

    async def lines() -> AsyncIterator[bytes]:
        for job, feed in zip(jobs, feeds, strict=True):
            async for line in _lines_of(job, feed, after):
                yield line
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers=_HEADERS)


async def _lines_of(job: AsyncJob, feed: Feed, after: int) -> AsyncIterator[bytes]:
    """What came before ``after`` is fed, since later chunks follow from it, and not sent."""
    try:
        async with job.stream() as stream:
            while batch := await stream.next_batch():
                out = bytearray()
                for seq, event in batch:
                    chunks = [_encode(chunk) for chunk in feed(event)]
                    if seq > after:
                        for chunk in chunks:
                            out += b"id: %d\ndata: %b\n\n" % (seq, chunk)
                    if is_terminal(event):
                        raise_for(event)
                if out:
                    yield bytes(out)
    except TokenfleetError as error:
        yield b"data: %b\n\n" % _encode({"error": error_object(error)})
