"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.aio_job import AsyncJob, AsyncStream, raise_for
from tokenfleet.producer.assembly import Assembly
from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.answers import (
    ReasoningCount,
    chat_message,
    created_s,
    logprobs_object,
    text_logprobs,
    usage_object,
)
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.chat_requests import from_chat_body, from_completion_body
from tokenfleet.producer.gateway.chunks import ChatChunks, StreamOptions, TextChunks
from tokenfleet.producer.gateway.media import take_media, taken_media
from tokenfleet.producer.gateway.metrics import Observed
from tokenfleet.producer.gateway.streaming import Source, event_stream, last_event_id
from tokenfleet.producer.gateway.webhooks import KINDS, webhook_of
from tokenfleet.wire.chat import ChatRequest, ScoreRequest
from tokenfleet.wire.errors import InvalidRequest, JobCancelled, Overloaded
from tokenfleet.wire.events import AnyEvent, Finished, Usage
from tokenfleet.wire.jobs import JobOptions
from tokenfleet.wire.keys import new_id
from tokenfleet.wire.results import ChatResult
from tokenfleet.wire.toolcalls import choice_key

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=documents.CHAT)
async def chat_completions(request: Request) -> Response:
    body = await read_body(request)
    settings, tenant = request.app.state.settings, request.state.tenant
    stream = StreamOptions.of(body)
    key = request.headers.get("idempotency-key")
    if isinstance(body.get("messages"), list):
        body["messages"] = await take_media(request, body["messages"])
    after = 0 if stream is None else last_event_id(request)
    # A caller who can come back by his key keeps the job when his connection breaks.
    chat, options = from_chat_body(body, settings, tenant, cancel_on_disconnect=key is None)
    job, model = await submit(request, chat, options, body, key)
    observed = request.app.state.metrics.job(model.partition(":")[0])
    if stream is not None:
        chunks = ChatChunks(job.id, model, stream, after)
        return await event_stream(request, [Source(job, chunks.frame, observed)])
    [answer] = await answers(request, [job], [observed])
    return _json(completion_object(answer.result, model, answer.created, answer.reasoning_tokens))


@router.post("/v1/completions", openapi_extra=documents.COMPLETIONS)
async def completions(request: Request) -> Response:
    body = await read_body(request)
    settings, tenant = request.app.state.settings, request.state.tenant
    stream = StreamOptions.of(body)
    key = request.headers.get("idempotency-key")
    asked = from_completion_body(body, settings, tenant, cancel_on_disconnect=key is None)
    if len(asked) > 1 and request.state.webhook is not None:
        raise InvalidRequest(
            "webhook: with one prompt only; each of several ends by itself.", code="unsupported_parameter",
            param="webhook",
        )  # fmt: skip
    # Each job's events are numbered by themselves: only one job's stream can be gone on with by a number.
    after = last_event_id(request) if stream is not None and len(asked) == 1 else 0
    keys = [key if k == 0 or key is None else f"{key}\0{k}" for k in range(len(asked))]
    async with contextlib.AsyncExitStack() as not_all:  # one that is refused takes those before it along
        submitted = []
        for (chat, options), each_key in zip(asked, keys, strict=True):
            submitted.append(await submit(request, chat, options, body, each_key))
            not_all.push_async_exit(submitted[-1][0].stream())
        not_all.pop_all()
    jobs, model = [job for job, _ in submitted], submitted[0][1]
    n = asked[0][0].params.n
    observed = [request.app.state.metrics.job(model.partition(":")[0]) for _ in jobs]
    if stream is not None:
        # One usage, of all prompts together, comes last.
        each = StreamOptions(stream.usage and len(jobs) == 1, stream.continuous and len(jobs) == 1)
        chunks = [TextChunks(jobs[0].id, model, each, after, offset=k * n) for k in range(len(jobs))]
        total = AllUsage(chunks[0], len(jobs)) if stream.usage and len(jobs) > 1 else None
        frames = [chunk.frame if total is None else total.then(chunk) for chunk in chunks]
        sources = [Source(*parts) for parts in zip(jobs, frames, observed, strict=True)]
        return await event_stream(request, sources)
    done = await answers(request, jobs, observed)
    return _json(text_object(jobs[0].id, done, model, n))


async def submit(
    request: Request,
    chat: ChatRequest | ScoreRequest,
    options: JobOptions,
    body: dict[str, Any],
    key: str | None,
    *,
    shown: bytes = b"",
) -> tuple[AsyncJob, str]:
    """Queue it. The same ``Idempotency-Key`` of a tenant is the same job; with another body it is a `JobConflict`.

    Gives the job, and the name that its answers bear: with an adapter ``model:adapter``, whichever way that was asked
    for."""
    client: AsyncClient = request.app.state.client
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model: the name of a served model is needed.", param="model")
    name, _, adapter = model.partition(":")
    if adapter and isinstance(chat, ChatRequest) and model not in await client.models():
        model, chat = name, chat.model_copy(update={"adapter": adapter})
    options = await asked_for(request, options, key)
    job_id = new_id() if key is None else id_of_key(options.tenant, key)
    media = taken_media(request)
    try:
        job = await client.submit_request(chat, options, model=model, job_id=job_id, shown=shown, media=media)
    except (
        Overloaded
    ):  # which comes after the look at the served models, so this is one: a label, not a stranger's text
        request.state.served_model = name
        raise
    request.state.served_model = name
    return job, f"{model}:{chat.adapter}" if chat.adapter else model


async def asked_for(request: Request, options: JobOptions, key: str | None) -> JobOptions:
    """``options`` with what the request asks for beside its body's fields. A job stays as long as its key."""
    more: dict[str, Any] = {}
    if key is not None:
        more["retention_s"] = max(options.kept_s, request.app.state.settings.idempotency_s)
    if url := await webhook_of(request, getattr(request.state, "webhook", None)):
        # Who wants to be told need not wait.
        more |= {"webhook": url, "webhook_kind": KINDS[request.scope["path"]], "cancel_on_disconnect": False}
    return options.model_copy(update=more)


def id_of_key(tenant: str, key: str) -> str:
    if len(key) > 256:
        raise InvalidRequest("Idempotency-Key: at most 256 characters.", param="Idempotency-Key")
    h = hashlib.sha256(f"idempotency\0{tenant}\0{key}".encode()).hexdigest()[:32]
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


@dataclass(slots=True)
class Answer:
    """A job's whole answer. ``reasoning_tokens`` is None for a model without thoughts."""

    result: ChatResult
    created: int
    reasoning_tokens: int | None


async def answers(request: Request, jobs: list[AsyncJob], observed: list[Observed]) -> list[Answer]:
    """Wait for all; a client that leaves cancels them within 2 s (unless it can come back by its key)."""
    async with contextlib.AsyncExitStack() as stack:
        streams = [stack.push_async_exit(job.stream()) for job in jobs]
        waiting = asyncio.gather(*map(_answer, streams, observed))
        try:
            while not (await asyncio.wait([waiting], timeout=0.5))[0]:
                if await request.is_disconnected():
                    raise JobCancelled("The client left.")
            return await waiting
        except BaseException:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            raise


async def whole(request: Request, jobs: list[AsyncJob]) -> tuple[list[ChatResult], int]:
    """`answers`' results, and when the first job was submitted."""
    done = await answers(request, jobs, [Observed.nothing() for _ in jobs])
    return [answer.result for answer in done], done[0].created


async def _answer(stream: AsyncStream, observed: Observed) -> Answer:
    assembly, reasoning, created = Assembly(stream.job_id), ReasoningCount(), 0
    try:
        while batch := await stream.next_batch():
            observed.batch(batch)
            for _, event in batch:
                assembly.add(event)
                reasoning.add(event)
                created = created_s(event) or created
    finally:
        observed.close()
    assert assembly.terminal is not None
    raise_for(assembly.terminal)
    return Answer(assembly.result(), created, reasoning.tokens if reasoning.has_thoughts else None)


@dataclass
class AllUsage:
    """The usage of several prompts' jobs, streamed side by side, as one last chunk."""

    chunks: TextChunks
    left: int
    _usages: list[Usage] = field(default_factory=list)

    def then(self, chunk: TextChunks) -> Callable[[int, AnyEvent], bytes]:
        """``chunk``'s frames, and after the last job's last the usage."""

        def frame(seq: int, event: AnyEvent) -> bytes:
            out = chunk.frame(seq, event)
            if isinstance(event, Finished):
                self._usages.append(event.usage)
                if len(self._usages) == self.left:
                    prompt = sum(usage.prompt_tokens for usage in self._usages)
                    total = Usage(prompt, sum(usage.completion_tokens for usage in self._usages))
                    out += b"data: %b\n\n" % msgspec.json.encode(self.chunks.on_usage(total))
            return out

        return frame


def completion_object(result: ChatResult, model: str, created: int, reasoning: int | None = None) -> dict[str, Any]:
    """The ``chat.completion`` of a finished job."""
    choices = []
    for choice in result.choices:
        message, reason = chat_message(
            choice.text, result.parser, choice_key(result.job_id, choice.index), choice.finish_reason
        )
        logprobs = logprobs_object(choice.logprobs) if choice.logprobs else None
        choices.append({"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return {
        "id": f"chatcmpl-{result.job_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_object(result.usage, reasoning),
    }


def text_object(first_id: str, done: Sequence[Answer], model: str, n: int) -> dict[str, Any]:
    """The ``text_completion`` of finished jobs, one a prompt, each with ``n`` choices."""
    choices = [
        {
            "index": k * n + c.index,
            "text": c.text,
            "logprobs": text_logprobs(c.logprobs),
            "finish_reason": c.finish_reason,
        }
        for k, answer in enumerate(done)
        for c in answer.result.choices
    ]
    usages = [answer.result.usage for answer in done]
    usage = Usage(sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages))
    head = {"id": f"cmpl-{first_id}", "object": "text_completion", "created": done[0].created, "model": model}
    return {**head, "choices": choices, "usage": usage_object(usage)}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
