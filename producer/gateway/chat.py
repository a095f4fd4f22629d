"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.aio import AsyncClient, AsyncJob
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.chat_requests import from_chat_body, from_completion_body
from tokenfleet.producer.gateway.chunks import (
    ChatChunks,
    TextChunks,
    chat_message,
    logprobs_object,
    usage_object,
)
from tokenfleet.producer.gateway.streaming import sse
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest, JobCancelled
from tokenfleet.wire.events import Usage
from tokenfleet.wire.jobs import JobOptions
from tokenfleet.wire.keys import new_id
from tokenfleet.wire.results import ChatResult

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body = await read_body(request)
    settings, tenant = request.app.state.settings, request.state.tenant
    key = request.headers.get("idempotency-key")
    # A caller who can come back by his key keeps the job when his connection breaks.
    chat, options = from_chat_body(body, settings, tenant, cancel_on_disconnect=key is None)
    job, model = await submit(request, chat, options, body, key)
    if body.get("stream"):
        chunks = ChatChunks(job.id, model, _wants_usage(body))
        return sse([job], [chunks.feed], _after(request))
    result, created = await whole(request, [job])
    return _json(_completion(result[0], model, created))


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    body = await read_body(request)
    settings, tenant = request.app.state.settings, request.state.tenant
    asked = from_completion_body(body, settings, tenant, cancel_on_disconnect=True)
    submitted = [await submit(request, chat, options, body, None) for chat, options in asked]
    jobs, model = [job for job, _ in submitted], submitted[0][1]
    n = asked[0][0].params.n
    if body.get("stream"):
        feeds = [TextChunks(job.id, model, _wants_usage(body), k * n).feed for k, job in enumerate(jobs)]
        return sse(jobs, list(feeds), 0)
    results, created = await whole(request, jobs)
    choices = [
        {
            "index": k * n + c.index,
            "text": c.text,
            "logprobs": _text_logprobs(c.logprobs),
            "finish_reason": c.finish_reason,
        }
        for k, result in enumerate(results)
        for c in result.choices
    ]
    usage = Usage(sum(r.usage.prompt_tokens for r in results), sum(r.usage.completion_tokens for r in results))
    head = {"id": f"cmpl-{jobs[0].id}", "object": "text_completion", "created": created, "model": model}
    return _json({**head, "choices": choices, "usage": usage_object(usage)})


async def submit(
    request: Request, chat: ChatRequest, options: JobOptions, body: dict[str, Any], key: str | None
) -> tuple[AsyncJob, str]:
    """Queue it. The same ``Idempotency-Key`` of a tenant is the same job; with another body it is a `JobConflict`."""
    client: AsyncClient = request.app.state.client
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model: the name of a served model is needed.", param="model")
    name, _, adapter = model.partition(":")
    if adapter and model not in await client.models():
        model, chat = name, chat.model_copy(update={"adapter": adapter})
    job_id = new_id() if key is None else id_of_key(options.tenant, key)
    return await client.submit_request(chat, options, model=model, job_id=job_id), model


def id_of_key(tenant: str, key: str) -> str:
    if len(key) > 256:
        raise InvalidRequest("Idempotency-Key: at most 256 characters.", param="Idempotency-Key")
    h = hashlib.sha256(f"idempotency\0{tenant}\0{key}".encode()).hexdigest()[:32]
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


async def whole(request: Request, jobs: list[AsyncJob]) -> tuple[list[ChatResult], int]:
    """Wait for all; a client that leaves cancels them within 2 s (unless it can come back by its key)."""
    waiting = asyncio.gather(*(job.result() for job in jobs))
    try:
        while not (await asyncio.wait([waiting], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise JobCancelled("The client left.")
        results = await waiting
        return results, (await jobs[0].status()).submitted_ms // 1000
    except BaseException:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        raise


def _completion(result: ChatResult, model: str, created: int) -> dict[str, Any]:
    choices = []
    for choice in result.choices:
        message, reason = chat_message(
            choice.text, result.parser, f"{result.job_id}:{choice.index}", choice.finish_reason
        )
        logprobs = logprobs_object(choice.logprobs) if choice.logprobs else None
        choices.append({"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return {
        "id": f"chatcmpl-{result.job_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_object(result.usage),
    }


def _text_logprobs(logprobs: Any) -> dict[str, Any] | None:
    """The older API's parallel lists."""
    if not logprobs:
        return None
    offsets, at = [], 0
    for token in logprobs:
        offsets.append(at)
        at += len(token.token)
    return {
        "tokens": [t.token for t in logprobs],
        "token_logprobs": [t.logprob for t in logprobs],
        "top_logprobs": [{a.token: a.logprob for a in t.top} for t in logprobs],
        "text_offset": offsets,
    }


def _wants_usage(body: dict[str, Any]) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


def _after(request: Request) -> int:
    last = request.headers.get("last-event-id", "0")
    if not last.isdecimal():
        raise InvalidRequest("Last-Event-ID: the id of an event of this stream is needed.", param="Last-Event-ID")
    return int(last)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
