"""``/v1/responses``: OpenAI's Responses API, in the background or waited for. A response is a job, whole in its log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.aio_job import AsyncJob, AsyncStream, raise_for
from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.chat import submit
from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.media import take_media
from tokenfleet.producer.gateway.metrics import Observed
from tokenfleet.producer.gateway.response_events import ResponseFold, Shown
from tokenfleet.producer.gateway.response_items import Asked, messages_of, page
from tokenfleet.producer.gateway.response_requests import check, from_response_body, without_instructions
from tokenfleet.producer.gateway.streaming import Source, event_stream, last_event_id
from tokenfleet.wire.chat import ChatRequest, Message
from tokenfleet.wire.errors import FleetUnavailable, InvalidRequest, JobCancelled, TokenfleetError
from tokenfleet.wire.events import AnyEvent, Expired, Failed
from tokenfleet.wire.jobs import parse_request
from tokenfleet.wire.keys import is_id
from tokenfleet.wire.ledger import Stored
from tokenfleet.wire.requests import check_size

router = APIRouter(prefix="/v1/responses")
_encode = msgspec.json.Encoder().encode
_READ_EVENTS = 1000


@router.post("", openapi_extra=documents.RESPONSES)
async def create(request: Request) -> Response:
    body = await read_body(request)
    settings, tenant = request.app.state.settings, request.state.tenant
    check(body, settings)
    asked, messages = Asked(body), messages_of(body.get("input"))
    earlier = await _conversation(request, body.get("previous_response_id"))
    key = request.headers.get("idempotency-key")
    leaves = key is None and not asked.background
    after = last_event_id(request) if body.get("stream") else 0
    messages = await take_media(request, messages)
    chat, options = from_response_body(body, earlier, messages, settings, tenant, cancel_on_disconnect=leaves)
    shown = asked.dump()
    check_size(shown)
    job, model = await submit(request, chat, options, body, key, shown=shown)
    fold = ResponseFold(response_id(job.id), job.id, asked)
    observed = request.app.state.metrics.job(model.partition(":")[0])
    if body.get("stream"):
        frames = Frames(fold, after)
        source = Source(job, frames.frame, observed)
        return await event_stream(request, [source], tail=b"", is_held=not asked.background, on_error=frames.on_error)
    if asked.background:
        observed.close()
        fold.created, fold.status = int(time.time()), "queued"
        with contextlib.suppress(FleetUnavailable):  # it is queued, and nobody would get its id
            await _read(request.app.state.client, fold)
        return _json(fold.response)
    await _finished(request, job, fold, observed)
    return _json(fold.response)


@router.get("/{response_id}")
async def retrieve(request: Request, response_id: str, stream: bool = False, starting_after: int = -1) -> Response:
    """As it is now; or its events, from any ``sequence_number`` on, followed until it ends.

    Until it has ended its output is told by its stream only: who polls costs no reading of a log."""
    job, asked, stored = await _found(request, response_id)
    fold = ResponseFold(response_id, job.id, asked)
    if not stream:
        if stored.state in ("queued", "running"):
            is_queued = asked.background and not stored.epoch
            fold.created, fold.status = stored.submitted_ms // 1000, "queued" if is_queued else "in_progress"
        else:
            await _read(request.app.state.client, fold)
        return _json(fold.response)
    frames = Frames(fold, last_event_id(request), starting_after)
    source = Source(job, frames.frame, Observed.nothing())
    return await event_stream(request, [source], tail=b"", is_held=False, on_error=frames.on_error)


@router.post("/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """End it, wherever it is; one that has ended stays as it is."""
    job, asked, _ = await _found(request, response_id)
    await job.cancel("cancelled by its caller")
    fold = ResponseFold(response_id, job.id, asked)
    await _read(request.app.state.client, fold)
    return _json(fold.response)


@router.delete("/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forget it now. One that runs is cancelled first."""
    job, _, _ = await _found(request, response_id)
    if not await request.app.state.client.ledger.forget(job.id):
        await job.cancel("deleted by its caller")
        await request.app.state.client.ledger.forget(job.id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items")
async def input_items(
    request: Request, response_id: str, after: str | None = None, limit: int = 20, order: str = "desc"
) -> Response:
    if not 1 <= limit <= 100:
        raise InvalidRequest("limit: 1 to 100.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order: asc or desc.", param="order")
    job, asked, _ = await _found(request, response_id)
    return _json(page(asked.input_items(job.id), after=after, limit=limit, order=order))


@dataclass
class Frames:
    """Server-sent events of a response. ``id:`` is the log's seq on the last event of an entry, and the seq before on
    those that stand before it: whoever resumes by it misses none. By ``sequence_number`` none comes twice either."""

    fold: ResponseFold
    after_seq: int = 0
    starting_after: int = -1

    def frame(self, seq: int, event: AnyEvent) -> bytes:
        events = self.fold.feed(event)
        if seq <= self.after_seq:
            return b""
        out = bytearray()
        for shown in events:
            if shown["sequence_number"] > self.starting_after:
                entry = seq if shown is events[-1] else seq - 1
                out += b"event: %b\nid: %d\ndata: %b\n\n" % (shown["type"].encode(), entry, _encode(shown))
        return bytes(out)

    def on_error(self, error: TokenfleetError) -> bytes:
        """What ended the stream and stands in no log. (What does, has its event.)"""
        if self.fold.status in ("failed", "cancelled"):
            return b""
        shown = {
            "type": "error",
            "code": error.code,
            "message": str(error),
            "param": error.details.get("param"),
            "sequence_number": self.fold.next_number,
        }
        return b"event: error\ndata: %b\n\n" % _encode(shown)


def response_id(job_id: str) -> str:
    return "resp_" + job_id.replace("-", "")


def _job_id(text: str) -> str | None:
    h = text.removeprefix("resp_")
    if h == text or len(h) != 32 or not is_id(h):
        return None
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


async def _found(request: Request, text: str) -> tuple[AsyncJob, Asked, Stored]:
    """Raises `NotFound` for what is not there, no response, not to be shown again, or another tenant's."""
    client: AsyncClient = request.app.state.client
    job_id = _job_id(text)
    stored = await client.ledger.stored(job_id) if job_id else None
    if job_id and stored is not None and stored.shown and stored.options.tenant == request.state.tenant:
        asked = Asked.stored(stored.shown)
        if asked.store:
            return client.job(job_id), asked, stored
    raise NotFound(f"There is no response {text[:64]!r}.", code="response_not_found")


async def _conversation(request: Request, previous: str | None) -> list[Message]:
    """The messages up to and with the answer of an earlier response, while that is kept."""
    if previous is None:
        return []
    try:
        job, asked, stored = await _found(request, previous)
    except NotFound as error:
        raise InvalidRequest(
            str(error), code="previous_response_not_found", hint="It may be past its retention; send the whole input.",
            param="previous_response_id",
        ) from None  # fmt: skip
    fold = ResponseFold(previous, job.id, asked)
    await _read(request.app.state.client, fold)
    if fold.status not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"The previous response is {fold.status}.", code="previous_response_not_ready", param="previous_response_id"
        )
    said = parse_request(stored.request)
    assert isinstance(said, ChatRequest)
    answer = messages_of(fold.response["output"]) if fold.response["output"] else []
    earlier = without_instructions(said.messages, asked.instructions)
    return [*earlier, *(Message.model_validate(message) for message in answer)]


async def _read(client: AsyncClient, fold: ResponseFold) -> None:
    """Fold all that the log has now."""
    seq = 0
    while events := await client.events(fold.job_id, seq, _READ_EVENTS):
        for _, event in events:
            fold.feed(event)
        seq = events[-1][0]
        if len(events) < _READ_EVENTS:
            return


async def _finished(request: Request, job: AsyncJob, fold: ResponseFold, observed: Observed) -> None:
    """Follow it to its end. Raises why it failed; a client that leaves cancels it within 2 s."""

    async def follow(stream: AsyncStream) -> None:
        while batch := await stream.next_batch():
            observed.batch(batch)
            for _, event in batch:
                fold.feed(event)
                if isinstance(event, Failed | Expired):
                    raise_for(event)

    async with contextlib.AsyncExitStack() as stack:
        following = asyncio.ensure_future(follow(stack.push_async_exit(job.stream())))
        try:
            while not (await asyncio.wait([following], timeout=0.5))[0]:
                if await request.is_disconnected():
                    raise JobCancelled("The client left.")
            following.result()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            observed.close()


def _json(value: Shown | dict[str, Any]) -> Response:
    return Response(_encode(value), media_type="application/json")
