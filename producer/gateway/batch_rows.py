"""One row of a batch is a request to the gateway's own routes, made inside the process: so it answers as they do.

Its job's id follows from the batch and the row (by its idempotency key): whoever runs the row again gets the same job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import msgspec
from fastapi import FastAPI
from starlette.datastructures import State

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.aio_job import AsyncJob
from tokenfleet.producer.gateway import errors
from tokenfleet.wire.chat import ChatRequest, ScoreRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import JobOptions

log = logging.getLogger(__name__)

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/score/evaluation"})
ROW_RETENTION_S = 86400.0
_TRIES = 3
_LATER_S = 60.0
"""A row's job outlives its batch's window by this much: it is the batch that ends it, with the batch's own error."""
_LATER = frozenset({429, 503})
"""Not taken in now: the row waits, as long as its batch may."""
_AGAIN = frozenset({409, 500, 502})
"""The engine or its worker failed: perhaps not the row's fault. Or another release wrote the row's job otherwise."""


class Row(msgspec.Struct, frozen=True):
    """A line of the input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Looked(msgspec.Struct, frozen=True):
    model: Any = None
    stream: Any = None
    background: Any = None
    webhook: Any = None


class UsageOf(msgspec.Struct, frozen=True):
    """Of any endpoint's answer: the older names, or those of ``/v1/responses``."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Answer(msgspec.Struct, frozen=True):
    usage: UsageOf | None = None
    model: Any = None
    status: Any = None


@dataclass(slots=True)
class Outcome:
    """A row's line in the output file (``is_ok``) or the error file."""

    line: bytes
    is_ok: bool
    usage: UsageOf = field(default_factory=UsageOf)
    model: str | None = None
    jobs: list[str] = field(default_factory=list)
    is_unrun: bool = False


@dataclass(slots=True)
class Ending:
    """Why a batch ends early: ``batch_cancelled``, ``batch_expired``, or "" while it doesn't."""

    why: str = ""
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, why: str) -> None:
        self.why = self.why or why
        self.event.set()


@dataclass(slots=True)
class _Running:
    window_s: float
    jobs: list[str]


_running: ContextVar[_Running] = ContextVar("_running")


class RowClient(AsyncClient):
    """Submits as a batch does: behind all others, and kept until the batch has it in a file."""

    async def _submit(
        self,
        request: ChatRequest | ScoreRequest,
        options: JobOptions,
        model: str | None,
        job_id: str | None,
        **more: Any,
    ) -> AsyncJob:
        row = _running.get()
        if job_id is not None and job_id not in row.jobs:
            row.jobs.append(job_id)
        options = options.model_copy(
            update={"priority": "batch", "retention_s": ROW_RETENTION_S, "deadline_s": row.window_s + _LATER_S,
                    "queue_ttl_s": row.window_s + _LATER_S, "cancel_on_disconnect": False}
        )  # fmt: skip
        return await super()._submit(request, options, model, job_id, **more)


def rows_app(parts: Sequence[ModuleType], client: RowClient, shared: State) -> FastAPI:
    """The same routes, without the guard: nobody outside the process can reach them. ``shared`` is what they need."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    errors.install(app)
    for name in shared:
        app.state[name] = shared[name]
    app.state.client = client
    for part in parts:
        app.include_router(part.router)
    return app


@dataclass(slots=True)
class RowRunner:
    """Runs the rows of one batch."""

    app: FastAPI
    batch_id: str
    tenant: str
    endpoint: str
    window_s: float

    async def run(self, number: int, row: Row, jobs: list[str], ending: Ending) -> Outcome:
        """The row's outcome, in the end. ``jobs`` gets the ids of its jobs as they are submitted."""
        if refusal := _refusal(row):
            return self.outcome(number, row.custom_id, refusal, 400)
        _running.set(_Running(self.window_s, jobs))
        tries = 0
        while not ending.event.is_set():
            key = f"{self.batch_id}:{number}:{tries}"
            status, body, retry_after_s = await call(self.app, self.endpoint, self.tenant, key, bytes(row.body))
            if ending.event.is_set() and (status != 200 or _was_cancelled(body)):
                break
            if status in _LATER:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(30.0, retry_after_s) * random.uniform(0.5, 1.5)):
                        await ending.event.wait()
                continue
            if status in _AGAIN and tries + 1 < _TRIES:
                tries += 1
                continue
            outcome = self.outcome(number, row.custom_id, body, status)
            outcome.jobs = jobs
            return outcome
        return self.unrun(number, row.custom_id, ending.why)

    def outcome(self, number: int, custom_id: str, body: bytes, status: int) -> Outcome:
        request_id = f"{self.batch_id}-{number}"
        response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
        line = {"id": f"batch_req_{self._hex}{number:08x}", "custom_id": custom_id, "response": response, "error": None}
        answer = msgspec.json.decode(body, type=_Answer) if status == 200 else _Answer()
        model = answer.model if isinstance(answer.model, str) else None
        return Outcome(msgspec.json.encode(line) + b"\n", status == 200, answer.usage or UsageOf(), model)

    def unrun(self, number: int, custom_id: str, why: str) -> Outcome:
        """The line of a row that the batch ended before: ``why`` is ``batch_expired`` or ``batch_cancelled``."""
        said = {
            "batch_expired": "This request could not be executed before the completion window expired.",
            "batch_cancelled": "The batch was cancelled before this request was executed.",
        }
        error = {"code": why, "message": said[why]}
        line = {"id": f"batch_req_{self._hex}{number:08x}", "custom_id": custom_id, "response": None, "error": error}
        return Outcome(msgspec.json.encode(line) + b"\n", is_ok=False, is_unrun=True)

    @property
    def _hex(self) -> str:
        return self.batch_id.removeprefix("batch_")[:24]


def _refusal(row: Row) -> bytes | None:
    looked = msgspec.json.decode(row.body, type=_Looked)
    for name in ("stream", "background", "webhook"):
        if getattr(looked, name):
            error = errors.error_object(
                InvalidRequest(f"{name}: not in a batch.", code="unsupported_parameter", param=name)
            )
            return msgspec.json.encode({"error": error})
    return None


def _was_cancelled(body: bytes) -> bool:
    """A response that was cancelled is shown as one, with status 200."""
    return bool(msgspec.json.decode(body, type=_Answer).status == "cancelled")


async def call(app: FastAPI, path: str, tenant: str, key: str, body: bytes) -> tuple[int, bytes, float]:
    """``POST path`` inside the process: status, body, and ``Retry-After`` in seconds (1 where none was said)."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"idempotency-key", key.encode()),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": None, "server": None, "state": {"tenant": tenant},
    }  # fmt: skip
    pending = [{"type": "http.request", "body": body, "more_body": False}]
    status, retry_after_s, answer = 500, 1.0, bytearray()

    async def receive() -> dict[str, Any]:
        if pending:
            return pending.pop()
        await asyncio.Event().wait()  # this client never leaves
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal status, retry_after_s
        if message["type"] == "http.response.start":
            status = message["status"]
            told = dict(cast("list[tuple[bytes, bytes]]", message["headers"])).get(b"retry-after", b"1")
            retry_after_s = float(told)
        else:
            answer.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # Starlette raises it again after it answered 500: the row failed, not the batch
        log.exception("a row of a batch met a bug")
    return status, bytes(answer) or b"null", retry_after_s
