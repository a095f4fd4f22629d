"""``GET /v1/chat/completions/{id}``, ``GET /v1/completions/{id}``: an answer once more, while its job is kept."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.gateway.chat import Answer, answers, completion_object, text_object
from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.metrics import Observed
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import parse_request

router = APIRouter()


@router.get("/v1/chat/completions/{completion_id}")
async def retrieve_chat(completion_id: str, request: Request) -> Response:
    _, model, answer = await _ended(request, completion_id, "chatcmpl-")
    return _json(completion_object(answer.result, model, answer.created, answer.reasoning_tokens))


@router.get("/v1/completions/{completion_id}")
async def retrieve_text(completion_id: str, request: Request) -> Response:
    """Of one prompt: of several, each was a job of its own, and only the first one's id was told."""
    chat, model, answer = await _ended(request, completion_id, "cmpl-")
    return _json(text_object(answer.result.job_id, [answer], model, chat.params.n))


async def _ended(request: Request, completion_id: str, prefix: str) -> tuple[ChatRequest, str, Answer]:
    """Raises `NotFound` for what is not there, of the other kind, or another tenant's; for one that failed, its own
    error."""
    client: AsyncClient = request.app.state.client
    job_id = completion_id.removeprefix(prefix)
    stored = await client.ledger.stored(job_id) if job_id != completion_id else None
    chat = parse_request(stored.request) if stored is not None and not stored.shown else None
    is_text = prefix == "cmpl-"
    if (
        stored is None
        or not isinstance(chat, ChatRequest)
        or (chat.prompt is not None) is not is_text
        or stored.options.tenant != request.state.tenant
    ):
        raise NotFound(f"There is no completion {completion_id[:64]!r}.", param="completion_id")
    if stored.state in ("queued", "running"):
        raise InvalidRequest("This has not ended.", code="not_ended", hint="Ask again later, or use a webhook.")
    [answer] = await answers(request, [client.job(job_id)], [Observed.nothing()])
    return chat, f"{stored.model}:{chat.adapter}" if chat.adapter else stored.model, answer


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
