"""What callers hand in, as a request: plain messages or pydantic ones, bare tools, parameters by name."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from tokenfleet.wire.chat import ChatRequest, GenerationParams, Message, ScoreRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import JobOptions, invalid, options_of

Messages = str | Sequence[Mapping[str, Any] | Message]

MAX_REQUEST_BYTES = 4 * 1024 * 1024
_REQUEST_NAMES = frozenset(ChatRequest.model_fields) - {"kind", "messages", "params"}
_OPTION_NAMES = frozenset(JobOptions.model_fields) | {"countdown", "eta"}
_MEDIA_NAMES = ("images", "videos", "audios")
_MAX_TOKENS = ("max_new_tokens", "max_tokens")
M = TypeVar("M", bound=BaseModel)
_any: TypeAdapter[Any] = TypeAdapter(Any)


def chat_request(
    messages: Messages, named: Mapping[str, Any], *, is_json: bool = False
) -> tuple[ChatRequest, JobOptions]:
    """Build a request and its job options from keyword arguments by their names. Raises `InvalidRequest`.

    The caller's objects are never changed. A string is one user message. None means "not given", but for the most
    tokens of an answer: there it is up to the context's end. ``is_json``: the values were read out of JSON, where each
    has its type: "1" is no number, and 1 is not true."""
    request: dict[str, Any] = {}
    options: dict[str, Any] = {}
    params: dict[str, Any] = {}
    for name, value in named.items():
        if (value is None and name not in _MAX_TOKENS) or (name in _MEDIA_NAMES and not value):
            continue
        if name in _MEDIA_NAMES:
            raise InvalidRequest(
                f"{name}: media don't travel inside a message of the queue.",
                code="unsupported_media",
                hint="client.upload() stores one and gives the part that names it in messages.",
                param=name,
            )
        if name in _REQUEST_NAMES:
            request[name] = value
        elif name in _OPTION_NAMES:
            options[name] = value
        else:
            params[name] = value
    if "tools" in request:
        request["tools"] = _tools(request["tools"], is_json)
    if "max_length" in params and not any(name in params for name in _MAX_TOKENS):
        params["max_new_tokens"] = None  # the caller bounds the whole length instead
    if messages or "prompt" not in request:
        request["messages"] = _messages(messages)
    try:
        valid = _validated(GenerationParams, params, is_json)
        return _validated(ChatRequest, request, is_json).model_copy(update={"params": valid}), _options(options)
    except ValidationError as error:
        raise invalid(error, "chat request") from error


def score_request(
    texts: Sequence[str], named: Mapping[str, Any], *, is_json: bool = False
) -> tuple[ScoreRequest, JobOptions]:
    """Like `chat_request`, for texts to be scored."""
    options = {name: value for name, value in named.items() if name in _OPTION_NAMES and value is not None}
    rest = {name: value for name, value in named.items() if name not in _OPTION_NAMES and value is not None}
    if isinstance(texts, str):
        raise InvalidRequest("texts: a list of strings is needed, not one string.", param="texts")
    try:
        return _validated(ScoreRequest, {"texts": tuple(texts), **rest}, is_json), _options(options)
    except ValidationError as error:
        raise invalid(error, "score request") from error


def _validated(model: type[M], values: dict[str, Any], is_json: bool) -> M:
    # pydantic's strict mode knows that JSON has no tuples and no numbers as keys, if it is JSON that it is given.
    return model.model_validate_json(_any.dump_json(values), strict=True) if is_json else model.model_validate(values)


def _messages(messages: Messages) -> tuple[Any, ...]:
    if isinstance(messages, str):
        return ({"role": "user", "content": messages},)
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages: a list of messages (or one string) is needed.", param="messages")
    return tuple(dict(m) if isinstance(m, Mapping) else m for m in messages)


def _tools(tools: Any, is_json: bool) -> tuple[Any, ...]:
    """LLaMA-Factory takes tools as JSON text, OpenAI's clients as a list."""
    if is_json and not isinstance(tools, list):
        raise InvalidRequest("tools: a list of objects is needed.", param="tools")
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"tools: not valid JSON: {error}", param="tools") from error
    return tuple(tools) if isinstance(tools, list | tuple) else (tools,)


def _options(named: dict[str, Any]) -> JobOptions:
    """``countdown`` (seconds) and ``eta`` (an aware datetime) are Celery's names for ``delay_s``."""
    values = dict(named)
    countdown, eta = values.pop("countdown", None), values.pop("eta", None)
    if countdown is not None:
        values["delay_s"] = countdown
    if eta is not None:
        if not isinstance(eta, dt.datetime) or eta.tzinfo is None:
            raise InvalidRequest("eta: an aware datetime is needed.", hint="Give it a time zone.", param="eta")
        values["delay_s"] = max(0.0, (eta - dt.datetime.now(dt.UTC)).total_seconds())
    return options_of(values)


def check_size(body: bytes) -> None:
    """Raises `InvalidRequest` for a request too large to queue (media never lie inside it)."""
    if len(body) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"The request has {len(body)} bytes; at most {MAX_REQUEST_BYTES} are taken.", code="request_too_large"
        )


class Model(Protocol):
    """What is known of a model wherever requests are checked."""

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def modalities(self) -> tuple[str, ...]: ...

    @property
    def can_score(self) -> bool: ...

    @property
    def can_generate(self) -> bool: ...


def check_taken(model: Model, request: ChatRequest | ScoreRequest) -> None:
    """Raises `InvalidRequest` for what such a model never gives (``unsupported``) or takes."""
    if isinstance(request, ChatRequest):
        check_can_generate(model)
        check_modalities(model.modalities, (part.type for part in request.media))
    elif not model.can_score:
        raise InvalidRequest(
            "This model gives text, no scores.", code="unsupported", hint="Ask a reward model for them.", param="model"
        )
    check_adapter(model.adapters, request.adapter)


def check_can_generate(model: Model) -> None:
    if not model.can_generate:
        raise InvalidRequest(
            "This model gives scores, no text.", code="unsupported", param="model",
            hint="Ask for the scores of texts: Client.scores, ChatModel.get_scores, POST /v1/score/evaluation.",
        )  # fmt: skip


def check_adapter(adapters: Collection[str], asked: str | None) -> None:
    if asked is not None and asked not in adapters:
        raise InvalidRequest(
            f"This model has no adapter {asked[:128]!r}.",
            code="unknown_adapter",
            hint=f"It has: {', '.join(adapters) or 'none'}.",
            param="adapter",
        )


def check_modalities(modalities: Iterable[str], kinds: Iterable[str]) -> None:
    """Raises `InvalidRequest` (``unsupported_modality``) for the first kind of media that a model can't take."""
    taken = tuple(modalities)
    for kind in kinds:
        if kind not in taken:
            raise InvalidRequest(
                f"This model takes no {kind}.",
                code="unsupported_modality",
                hint=f"It takes: {', '.join(taken)}.",
                param="messages",
            )
