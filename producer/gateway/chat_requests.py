"""OpenAI's request bodies, as tokenfleet's requests. Defaults are OpenAI's; vLLM's further names are understood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from tokenfleet.producer.gateway.constraints import CONSTRAINTS, constraint_of
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import JobOptions
from tokenfleet.wire.requests import chat_request

# What OpenAI's API does when a request does not say.
_OPENAI_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": None}
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "n", "ignore_eos", "min_tokens", "skip_special_tokens", "adapter", "enable_thinking",
    "preserve_thinking", "tools", "tool_choice", "parallel_tool_calls", "logit_bias",
)  # fmt: skip
# Understood, and without effect on what is generated.
_LABELS: dict[str, tuple[type, str]] = {
    "user": (str, "a string"), "safety_identifier": (str, "a string"), "prompt_cache_key": (str, "a string"),
    "service_tier": (str, "a string"), "store": (bool, "true or false"), "metadata": (Mapping, "an object"),
}  # fmt: skip
_HARMLESS = ("model", "stream", "stream_options", *_LABELS)
_JOB = ("priority",)
_OURS = ("retention_s",)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_COMPLETION = ("prompt", "suffix", "best_of", "echo", "max_tokens", "logprobs", *CONSTRAINTS)
_CHAT = ("messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "chat_template_kwargs",
         "reasoning_effort", *CONSTRAINTS)  # fmt: skip
# OpenAI's, that nothing here can do; saying so is better than leaving them out, whatever the setting.
_REFUSED = {
    "functions": "Use tools.", "function_call": "Use tool_choice.", "audio": "", "prediction": "",
    "web_search_options": "", "moderation": "",
}  # fmt: skip


def from_chat_body(
    body: Mapping[str, Any], settings: GatewaySettings, tenant: str, *, cancel_on_disconnect: bool
) -> tuple[ChatRequest, JobOptions]:
    """Of ``POST /v1/chat/completions``. Raises `InvalidRequest`."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: a list with at least one message is needed.", param="messages")
    if len(messages) > settings.max_messages:
        raise InvalidRequest(f"messages: at most {settings.max_messages} are taken.", param="messages")
    check_fields(body, {*_SAME, *_HARMLESS, *_JOB, *_OURS, *_CHAT}, settings)
    named = named_of(body, settings, tenant, cancel_on_disconnect)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            named["max_new_tokens"] = body[name]
    named |= {name: body[name] for name in ("logprobs", "top_logprobs") if body.get(name) is not None}
    if body.get("top_logprobs") and body.get("logprobs") in (None, False):
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    with in_callers_words(body):
        return chat_request([message_of(m, k, settings) for k, m in enumerate(messages)], named, is_json=True)


def from_completion_body(
    body: Mapping[str, Any], settings: GatewaySettings, tenant: str, *, cancel_on_disconnect: bool
) -> list[tuple[ChatRequest, JobOptions]]:
    """Of ``POST /v1/completions``: one request per prompt. Raises `InvalidRequest`."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if not prompts or any(not isinstance(p, str | list) or not p for p in prompts):
        raise InvalidRequest("prompt: a string, a list of strings, or token ids are needed.", param="prompt")
    if len(prompts) > settings.max_prompts:
        raise InvalidRequest(f"prompt: at most {settings.max_prompts} are taken.", param="prompt")
    for name, allowed in (("suffix", None), ("best_of", 1), ("echo", False)):
        if (given := body.get(name)) is not None and not (type(given) is type(allowed) and given == allowed):
            raise InvalidRequest(f"{name} is not supported.", code="unsupported_parameter", param=name)
    check_fields(body, {*_SAME, *_HARMLESS, *_JOB, *_OURS, *_COMPLETION}, settings)
    named = named_of(body, settings, tenant, cancel_on_disconnect)
    named["max_new_tokens"] = 16 if body.get("max_tokens") is None else body["max_tokens"]  # OpenAI's default here
    if body.get("logprobs") is not None:
        named |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    with in_callers_words(body):
        return [chat_request((), {**named, "prompt": p}, is_json=True) for p in prompts]


_OUR_WORDS = {
    "max_new_tokens": ("max_output_tokens", "max_completion_tokens", "max_tokens"),
    "template_kwargs": ("chat_template_kwargs",),
    "top_logprobs": ("top_logprobs", "logprobs"),
}


@contextmanager
def in_callers_words(body: Mapping[str, Any]) -> Iterator[None]:
    """A refusal names the field as ``body`` does."""
    try:
        yield
    except InvalidRequest as error:
        param = str(error.details.get("param", ""))
        ours = param.partition(".")[0]
        theirs = next((name for name in _OUR_WORDS.get(ours, ()) if body.get(name) is not None), ours)
        if theirs == ours:
            raise
        more = {**error.details, "param": theirs + param.removeprefix(ours)}
        raise InvalidRequest(
            error.message.replace(ours, theirs, 1), code=error.code, hint=error.hint, **more
        ) from error


def check_fields(body: Mapping[str, Any], known: Set[str], settings: GatewaySettings) -> None:
    """Raises `InvalidRequest` for what can't be done, for labels of the wrong type, and, unless unknown fields are to
    be ignored, for those."""
    for name, (kind, words) in _LABELS.items():
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise InvalidRequest(f"{name}: {words} is needed.", param=name)
    for name in _REFUSED.keys() & body.keys():
        if body[name] is not None:
            raise InvalidRequest(
                f"{name} is not supported.", code="unsupported_parameter", hint=_REFUSED[name], param=name
            )
    if settings.unknown_fields == "refuse" and (unknown := sorted(set(body) - known - _REFUSED.keys())):
        raise InvalidRequest(f"Unknown field {unknown[0][:64]!r}.", code="unknown_field", param=unknown[0][:64])


def named_of(body: Mapping[str, Any], settings: GatewaySettings, tenant: str, cancel: bool) -> dict[str, Any]:
    """The arguments by name that all of OpenAI's routes share."""
    named = dict(_OPENAI_DEFAULTS)
    named |= {name: body[name] for name in (*_SAME, *_JOB) if body.get(name) is not None}
    if (constraint := constraint_of(body)) is not None:
        named["response_format"] = constraint
    if (kwargs := body.get("chat_template_kwargs")) is not None:
        named["template_kwargs"] = kwargs
    if (effort := body.get("reasoning_effort")) is not None:
        named.setdefault("enable_thinking", is_thinking_wanted(effort, "reasoning_effort"))
    named |= {
        "tenant": tenant,
        "cancel_on_disconnect": cancel,
        "retention_s": retention_of(body, settings),
        "deadline_s": settings.deadline_s,
        "queue_ttl_s": settings.queue_ttl_s,
    }
    return named


def is_thinking_wanted(effort: Any, param: str) -> bool:
    """Thoughts are on or off here: "none" is off, all other efforts are on."""
    if effort not in EFFORTS:
        raise InvalidRequest(f"{param}: one of {', '.join(EFFORTS)} is needed.", param=param)
    return bool(effort != "none")


def retention_of(body: Mapping[str, Any], settings: GatewaySettings) -> float:
    """``retention_s``: how long the ended job is to stay readable. Raises `InvalidRequest`."""
    wanted = body.get("retention_s")
    if wanted is None:
        return settings.retention_s
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= settings.max_retention_s:
        raise InvalidRequest(
            f"retention_s: a number of seconds up to {settings.max_retention_s:g} is needed.", param="retention_s"
        )
    return float(wanted)


_CONTENT_OF = {"text": "text", "image": "ref", "video": "ref", "audio": "ref"}


def message_of(message: Any, index: int, settings: GatewaySettings) -> dict[str, Any]:
    """One of OpenAI's messages; its media are references already (`media.take_media`)."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages.{index}: an object is needed.", param=f"messages.{index}")
    known = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    result = {name: message[name] for name in known if message.get(name) is not None}
    if result.get("role") == "developer":
        result["role"] = "system"
    content = result.get("content")
    if isinstance(content, list):
        if len(content) > settings.max_parts:
            raise InvalidRequest(f"messages.{index}: at most {settings.max_parts} parts are taken.", param="messages")
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image", "video", "audio") or (kind != "text" and "ref" not in part):
                raise InvalidRequest(
                    f"messages.{index}: parts of type {str(kind)[:64]!r} are not supported.", code="unsupported_media",
                    param=f"messages.{index}.content",
                )  # fmt: skip
        result["content"] = [{name: part.get(name) for name in ("type", _CONTENT_OF[part["type"]])} for part in content]
    if calls := result.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise InvalidRequest(f"messages.{index}.tool_calls: a list of objects is needed.", param="messages")
        result["tool_calls"] = [{k: c[k] for k in ("id", "type", "function") if k in c} for c in calls]
    return result
