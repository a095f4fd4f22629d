"""A job as its submitter describes it, and as the ledger tells of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tokenfleet.wire.chat import ChatRequest, Request, ScoreRequest, WrongField
from tokenfleet.wire.errors import ErrorBody, InvalidRequest
from tokenfleet.wire.keys import Priority
from tokenfleet.wire.results import Timing

State = Literal["queued", "running", "finished", "failed", "cancelled", "expired"]
Seconds = Annotated[float, Field(gt=0, le=90 * 86400, allow_inf_nan=False)]


class JobOptions(BaseModel):
    """How a job is to be handled; nothing here changes its text.

    ``durable`` demands that the job can be taken over: parameters that this engine could not continue are refused
    before the first token. ``cancel_on_disconnect`` cancels when the submitter's own stream is closed early.
    Times are seconds in Redis' clock, from submit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    priority: Literal["interactive", "normal", "batch"] = "interactive"
    tags: dict[str, str] = Field(default_factory=dict, max_length=16)
    delay_s: Annotated[float, Field(ge=0, le=30 * 86400, allow_inf_nan=False)] = 0.0
    queue_ttl_s: Seconds = 3600.0
    deadline_s: Seconds = 86400.0
    retention_s: Seconds | None = None
    durable: bool = False
    cancel_on_disconnect: bool = False
    tenant: str = Field("", max_length=64)
    """Whose job it is; the gateway lets nobody else see it, and the tenant's limits hold for it."""
    webhook: str = Field("", max_length=2048)
    """An address that a gateway tells when the job has ended, signed with the tenant's secret."""
    webhook_kind: str = Field("job", max_length=64)
    """What ended, in the event's words: ``chat.completion``, ``response``, ..."""
    retry_of: str = Field("", max_length=36)
    """The failed job whose request this is again."""

    @model_validator(mode="after")
    def _tags_are_small(self) -> Self:
        if sum(len(k) + len(v) for k, v in self.tags.items()) > 1024:
            raise ValueError("tags: at most 1024 characters in all")
        return self

    @property
    def lane(self) -> Priority:
        return Priority[self.priority]

    @property
    def kept_s(self) -> float:
        """Seconds that the ended job stays readable: 10 minutes, 24 hours for batch, unless set."""
        return self.retention_s or (86400.0 if self.priority == "batch" else 600.0)


class ServedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A served model as the registry tells of it. ``name`` is a label; paths never leave the worker."""

    name: str
    engine: str = ""
    context_tokens: int = 0
    adapters: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ("text",)
    can_score: bool = False
    can_generate: bool = True
    template: str | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A snapshot of the ledger. Times are Redis' clock in ms since 1970; None where it has not come to that yet."""

    id: str
    state: State
    model: str
    position: int | None
    """How many jobs are served before it, while it is queued."""
    waiting_for_worker: bool
    """It is queued and no worker serves its model now."""
    attempts: int
    strikes: int
    events: int
    completion_tokens: int
    worker: str | None
    submitted_ms: int
    first_claimed_ms: int | None
    first_token_ms: int | None
    ended_ms: int | None
    deadline_ms: int
    tags: dict[str, str]
    priority: str
    error: ErrorBody | None = None

    @property
    def is_ended(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def timing(self) -> Timing:
        """The same times as spans."""

        def span(begin: int | None, end: int | None) -> float | None:
            return None if begin is None or end is None else (end - begin) / 1000

        writing_s = span(self.first_token_ms, self.ended_ms)
        return Timing(
            queue_wait_s=span(self.submitted_ms, self.first_claimed_ms),
            ttft_s=span(self.submitted_ms, self.first_token_ms),
            total_s=span(self.submitted_ms, self.ended_ms),
            # The first token came at the beginning of that time, not in it.
            tokens_per_s=(self.completion_tokens - 1) / writing_s if writing_s and self.completion_tokens > 1 else None,
        )


_request: TypeAdapter[ChatRequest | ScoreRequest] = TypeAdapter(Request)


def invalid(error: ValidationError, what: str) -> InvalidRequest:
    """The first thing that is wrong, in a caller's words; its value is left out, since it may be part of a prompt."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"] if p not in ("chat", "score"))
    cause = first.get("ctx", {}).get("error")
    param = ".".join([place, cause.field] if place else [cause.field]) if isinstance(cause, WrongField) else place
    reason = first["msg"].removeprefix("Value error, ")
    hint = "Unknown names are refused: is it misspelt?" if first["type"] == "extra_forbidden" else ""
    return InvalidRequest(f"{what}: {place}: {reason}" if place else f"{what}: {reason}", hint=hint, param=param)


def parse_request(data: bytes | str) -> ChatRequest | ScoreRequest:
    """A request out of the ledger. Raises `InvalidRequest`."""
    try:
        return _request.validate_json(data)
    except ValidationError as error:
        raise invalid(error, "the stored request is not valid") from error


def dump_request(request: ChatRequest | ScoreRequest) -> bytes:
    """What the ledger stores. A limit that was asked for stays, though it be the default, which yields to others."""
    body = {"kind": request.kind, **request.model_dump(mode="json", exclude_defaults=True)}
    if isinstance(request, ChatRequest) and "max_new_tokens" in request.params.model_fields_set:
        body.setdefault("params", {})["max_new_tokens"] = request.params.max_new_tokens
    return msgspec.json.encode(body)


def digest(model: str, request: bytes, options: JobOptions) -> str:
    """Tells whether two submissions with one id are the same."""
    return hashlib.sha256(
        b"\0".join([model.encode(), request, options.model_dump_json(exclude_defaults=True).encode()])
    ).hexdigest()[:32]


def options_of(values: dict[str, Any]) -> JobOptions:
    try:
        return JobOptions(**values)
    except ValidationError as error:
        raise invalid(error, "job options") from error
