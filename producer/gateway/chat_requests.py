"""OpenAI's request bodies, as tokenfleet's requests. Defaults are OpenAI's; vLLM's further names are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "preserve_thinking", "tools", "tool_choice", "parallel_tool_calls",
)  # fmt: skip
# Understood, and without effect on what is generated.
_HARMLESS = (
    "model", "messages", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key",
)  # fmt: skip
_JOB = ("priority",)
_CHAT = ("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format", "logit_bias",
         "chat_template_kwargs", "reasoning_effort", "structured_outputs", "guided_json", "guided_regex",
         "guided_grammar")  # fmt: skip


def from_chat_body(
    body: Mapping[str, Any], settings: GatewaySettings, tenant: str, *, cancel_on_disconnect: bool
) -> tuple[ChatRequest, JobOptions]:
    """Of ``POST /v1/chat/completions``. Raises `InvalidRequest`."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: a list with at least one message is needed.", param="messages")
    if len(messages) > settings.max_messages:
        raise InvalidRequest(f"messages: at most {settings.max_messages} are taken.", param="messages")
    if settings.unknown_fields == "refuse":
        known = {*_SAME, *_HARMLESS, *_JOB, *_CHAT}
        if unknown := sorted(set(body) - known):
            raise InvalidRequest(f"Unknown field {unknown[0]!r}.", code="unknown_field", param=unknown[0])
    named = _named(body, settings, tenant, cancel_on_disconnect)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit is not None:
        named["max_new_tokens"] = limit
    if body.get("logprobs"):
        named |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    elif body.get("top_logprobs"):
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    if kwargs := body.get("chat_template_kwargs"):
        named["template_kwargs"] = kwargs
    return chat_request([_message(m, k, settings) for k, m in enumerate(messages)], named)


def from_completion_body(
    body: Mapping[str, Any], settings: GatewaySettings, tenant: str, *, cancel_on_disconnect: bool
) -> list[tuple[ChatRequest, JobOptions]]:
    """Of ``POST /v1/completions``: one request per prompt. Raises `InvalidRequest`."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if not prompts or any(not isinstance(p, str | list) or not p for p in prompts):
        raise InvalidRequest("prompt: a string, a list of strings, or token ids are needed.", param="prompt")
    for name, allowed in (("suffix", None), ("best_of", 1), ("echo", False)):
        if body.get(name) not in (None, allowed):
            raise InvalidRequest(f"{name} is not supported.", code="unsupported_parameter", param=name)
    named = _named(body, settings, tenant, cancel_on_disconnect)
    named["max_new_tokens"] = body.get("max_tokens") or 16  # OpenAI's default here
    if body.get("logprobs") is not None:
        named |= {"logprobs": True, "top_logprobs": int(body["logprobs"])}
    return [chat_request((), {**named, "prompt": p if isinstance(p, str) else tuple(p or ())}) for p in prompts]


def _named(body: Mapping[str, Any], settings: GatewaySettings, tenant: str, cancel: bool) -> dict[str, Any]:
    named = dict(_OPENAI_DEFAULTS)
    named |= {name: body[name] for name in (*_SAME, *_JOB) if body.get(name) is not None}
    if bias := body.get("logit_bias"):
        named["logit_bias"] = bias
    if (constraint := _constraint(body)) is not None:
        named["response_format"] = constraint
    named |= {
        "tenant": tenant,
        "cancel_on_disconnect": cancel,
        "retention_s": settings.retention_s,
        "deadline_s": settings.deadline_s,
        "queue_ttl_s": settings.queue_ttl_s,
    }
    return named


def _constraint(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """OpenAI's response_format, or vLLM's structured_outputs and guided_*."""
    wanted = body.get("response_format")
    if isinstance(wanted, Mapping):
        match wanted.get("type"):
            case "text":
                return None
            case "json_object":
                return {"type": "json_object"}
            case "json_schema":
                schema = (wanted.get("json_schema") or {}).get("schema")
                if not isinstance(schema, Mapping):
                    raise InvalidRequest("response_format.json_schema.schema is needed.", param="response_format")
                return {"type": "json_schema", "json_schema": schema}
            case other:
                raise InvalidRequest(f"response_format: unknown type {other!r}.", param="response_format")
    outputs = dict(body.get("structured_outputs") or {})
    for name, old in (("json", "guided_json"), ("regex", "guided_regex"), ("grammar", "guided_grammar")):
        if body.get(old) is not None:
            outputs[name] = body[old]
    if "json" in outputs:
        return {"type": "json_schema", "json_schema": outputs["json"]}
    if "regex" in outputs:
        return {"type": "regex", "pattern": outputs["regex"]}
    if "grammar" in outputs:
        return {"type": "grammar", "grammar": outputs["grammar"]}
    return None


def _message(message: Any, index: int, settings: GatewaySettings) -> dict[str, Any]:
    """One of OpenAI's messages; text parts are taken, media parts are for a fleet that has media."""
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
            if kind != "text":
                raise InvalidRequest(
                    f"messages.{index}: parts of type {kind!r} can't be sent yet.", code="unsupported_media",
                    param=f"messages.{index}.content",
                )  # fmt: skip
        result["content"] = [{"type": "text", "text": part.get("text")} for part in content]
    if calls := result.get("tool_calls"):
        result["tool_calls"] = [{k: c[k] for k in ("id", "type", "function") if k in c} for c in calls]
    return result
