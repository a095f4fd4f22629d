"""Every error a user of tokenfleet can meet, split by who has to act.

    TokenfleetError                 code, message, hint, retryable, http_status
    ├── CallerError                 the request is wrong: mend it, sending it again won't help
    │   ├── InvalidRequest          invalid_request, unsupported_parameter, invalid_media, media_mismatch,
    │   │                           media_too_large, unsupported_media, unsupported_modality, url_refused, ...
    │   ├── ContextLengthExceeded   context_length_exceeded
    │   ├── UnknownModel            model_not_found
    │   ├── UnknownJob              unknown_job (never existed, or its retention is over)
    │   ├── JobConflict             job_conflict (same id, other body)
    │   └── Unauthorized            missing_api_key, invalid_api_key
    ├── Overloaded                  queue_full, memory_full, rate_limited, too_many_jobs, queue_share_full:
    │                               later; ``retry_after_s`` says when
    ├── EngineError                 the engine failed this request (engine_error, out_of_memory)
    │   └── EngineDead              engine_dead: no request can be served by this engine any more
    ├── JobFailed                   a terminal event read back: carries the code stored in the log
    │   ├── JobCancelled            cancelled
    │   ├── JobExpired              expired
    │   ├── StreamInterrupted       stream_interrupted: its worker died and it can't be continued
    │   ├── MediaGone               media_gone: what the job refers to expired, or Redis or the folder lost it
    │   └── LostState               lost_state: Redis came back without (part of) the job
    ├── FleetUnavailable            redis_unavailable, redis_too_old, wrong_eviction_policy, no_worker, fleet_failed
    └── ConfigurationError          bad settings, a missing extra: for whoever runs the fleet

``code`` is stable and machine-readable; ``str(error)`` says what was wrong and, in ``hint``, what to do about it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it stands in a log, a ledger or a response body."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False
    details: dict[str, Any] = {}
    kind: str = ""
    """The class it was: a code may be narrower than its class's."""


class TokenfleetError(Exception):
    """Base of all errors; ``details`` holds plain JSON values only (never a prompt or an output)."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, code: str | None = None, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
        if code is not None:
            self.code = code  # type: ignore[misc]  # an instance may narrow its class's code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_body, (self.to_body(),))

    def to_body(self) -> ErrorBody:
        return ErrorBody(self.code, self.message, self.hint, self.retryable, self.details, type(self).__name__)


class CallerError(TokenfleetError):
    http_status = 400


class InvalidRequest(CallerError):
    """``details['param']`` names the field that is wrong."""

    code = "invalid_request"


class ContextLengthExceeded(CallerError):
    """``details``: ``prompt_tokens``, ``max_new_tokens`` and ``context_tokens``."""

    code = "context_length_exceeded"


class UnknownModel(CallerError):
    code = "model_not_found"
    http_status = 404


class UnknownJob(CallerError):
    code = "unknown_job"
    http_status = 404


class JobConflict(CallerError):
    code = "job_conflict"
    http_status = 409


class Unauthorized(CallerError):
    code = "invalid_api_key"
    http_status = 401


class Overloaded(TokenfleetError):
    """``retry_after_s`` is an estimate from the queue's recent rate, in seconds."""

    code = "overloaded"
    retryable = True
    http_status = 429

    @property
    def retry_after_s(self) -> float:
        return float(self.details.get("retry_after_s", 1.0))


class EngineError(TokenfleetError):
    code = "engine_error"
    retryable = True


class EngineDead(EngineError):
    code = "engine_dead"


class JobFailed(TokenfleetError):
    code = "failed"


class JobCancelled(JobFailed):
    code = "cancelled"
    http_status = 499


class JobExpired(JobFailed):
    code = "expired"
    http_status = 504


class StreamInterrupted(JobFailed):
    code = "stream_interrupted"
    retryable = True
    http_status = 502


class LostState(JobFailed):
    code = "lost_state"
    retryable = True
    http_status = 502


class MediaGone(JobFailed):
    """``details['missing']``: sha256 of what is not there (16 at most)."""

    code = "media_gone"
    retryable = True
    http_status = 502


class FleetUnavailable(TokenfleetError):
    code = "fleet_unavailable"
    retryable = True
    http_status = 503


class ConfigurationError(TokenfleetError):
    code = "configuration_error"


def _tree(cls: type[TokenfleetError]) -> dict[str, type[TokenfleetError]]:
    found = {cls.code: cls, cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


def from_body(body: ErrorBody) -> TokenfleetError:
    """The error that ``body`` was made from; one with an unknown code (a newer release's) is a `JobFailed`."""
    tree = _tree(TokenfleetError)
    cls = tree.get(body.kind) or tree.get(body.code, JobFailed)
    error = cls(body.message, code=body.code, hint=body.hint, **body.details)
    if error.retryable != body.retryable:
        error.retryable = body.retryable  # type: ignore[misc]
    return error
