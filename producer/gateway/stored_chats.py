"""``GET /v1/chat/completions/{id}``: a chat's whole answer once more, while its job is kept."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.gateway.chat import answers, completion_object
from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.metrics import Observed
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import parse_request

router = APIRouter()


@router.get("/v1/chat/completions/{completion_id}")
async def retrieve(completion_id: str, request: Request) -> Response:
    """Raises `NotFound` for what is not there, no chat, or another tenant's; for one that failed, its own error."""
    client: AsyncClient = request.app.state.client
    job_id = completion_id.removeprefix("chatcmpl-")
    stored = await client.ledger.stored(job_id) if job_id != completion_id else None
    if stored is None or stored.shown or stored.options.tenant != request.state.tenant:
        raise NotFound(f"There is no chat completion {completion_id[:64]!r}.", param="completion_id")
    chat = parse_request(stored.request)
    if not isinstance(chat, ChatRequest) or chat.prompt is not None:
        raise NotFound(f"There is no chat completion {completion_id[:64]!r}.", param="completion_id")
    if stored.state in ("queued", "running"):
        raise InvalidRequest("This chat has not ended.", code="not_ended", hint="Ask again later, or use a webhook.")
    [answer] = await answers(request, [client.job(job_id)], [Observed.nothing()])
    model = f"{stored.model}:{chat.adapter}" if chat.adapter else stored.model
    shown = completion_object(answer.result, model, answer.created, answer.reasoning_tokens)
    return Response(msgspec.json.encode(shown), media_type="application/json")
