"""``POST /v1/responses``: its body as a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenfleet.producer.gateway import chat_requests
from tokenfleet.producer.gateway.chat_requests import check_fields, in_callers_words, is_thinking_wanted, named_of
from tokenfleet.producer.gateway.response_items import Shown
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire.chat import ChatRequest, Message
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import JobOptions
from tokenfleet.wire.requests import chat_request

_KNOWN = frozenset({
    "model", "input", "instructions", "background", "stream", "stream_options", "store", "metadata", "tools",
    "tool_choice", "parallel_tool_calls", "max_output_tokens", "max_tool_calls", "text", "reasoning", "include",
    "previous_response_id", "temperature", "top_p", "top_logprobs", "truncation", "user", "safety_identifier",
    "service_tier", "prompt_cache_key", "prompt_cache_retention", "priority", "retention_s",
    # vLLM's and ours
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "ignore_eos", "min_tokens", "skip_special_tokens", "logit_bias", "adapter", "enable_thinking", "preserve_thinking",
    "chat_template_kwargs", "structured_outputs",
})  # fmt: skip
_UNSUPPORTED = ("conversation", "prompt", "context_management", "moderation", "image", "n")
_LOGPROBS = "message.output_text.logprobs"
_FLAGS = ("background", "stream", "parallel_tool_calls")


def check(body: Mapping[str, Any], settings: GatewaySettings) -> None:
    """The plain fields, before anything is looked up. Raises `InvalidRequest`."""
    for name in _UNSUPPORTED:
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} is not supported.", code="unsupported_parameter", param=name)
    check_fields(body, _KNOWN | set(_UNSUPPORTED), settings)
    for name in _FLAGS:
        if not isinstance(body.get(name), bool | None):
            raise InvalidRequest(f"{name}: true or false is needed.", param=name)
    for name in ("instructions", "previous_response_id", "prompt_cache_retention"):
        if not isinstance(body.get(name), str | None):
            raise InvalidRequest(f"{name}: a string is needed.", param=name)
    if body.get("background") and body.get("store") is False:
        raise InvalidRequest("background needs store: true.", param="background")
    if body.get("truncation") not in (None, "disabled"):
        raise InvalidRequest(
            "truncation: only disabled; what is too long is refused.", code="unsupported_parameter", param="truncation"
        )
    metadata = body.get("metadata")
    if metadata is not None and not _is_metadata(metadata):
        raise InvalidRequest("metadata: at most 16 strings of 512 characters are taken.", param="metadata")
    if not isinstance(body.get("max_tool_calls"), int | None) or isinstance(body.get("max_tool_calls"), bool):
        raise InvalidRequest("max_tool_calls: a number is needed.", param="max_tool_calls")


def from_response_body(
    body: Mapping[str, Any],
    earlier: Sequence[Message],
    messages: Sequence[Shown],
    settings: GatewaySettings,
    tenant: str,
    *,
    cancel_on_disconnect: bool,
) -> tuple[ChatRequest, JobOptions]:
    """``earlier``: the conversation that it goes on with; ``messages``: its own input. Raises `InvalidRequest`."""
    if len(earlier) + len(messages) > settings.max_messages:
        raise InvalidRequest(f"input: at most {settings.max_messages} messages are taken.", param="input")
    text, reasoning = _object(body, "text"), _object(body, "reasoning")
    asked = {name: value for name, value in body.items() if name not in ("tools", "tool_choice")}
    asked |= _tools(body)
    if text.get("verbosity") not in (None, "medium"):
        raise InvalidRequest("text.verbosity is not supported.", code="unsupported_parameter", param="text")
    if (wanted := text.get("format")) is not None:
        asked["response_format"] = _format(wanted)
    if (effort := reasoning.get("effort")) is not None and body.get("enable_thinking") is None:
        asked["enable_thinking"] = is_thinking_wanted(effort, "reasoning")
    named = named_of(asked, settings, tenant, cancel_on_disconnect)
    if body.get("max_output_tokens") is not None:
        named["max_new_tokens"] = body["max_output_tokens"]
    if _includes_logprobs(body) or body.get("top_logprobs") is not None:
        top = body.get("top_logprobs")
        # A number of none asks for none.
        named |= {"logprobs": _includes_logprobs(body) or top != 0, "top_logprobs": 0 if top is None else top}
    own = [chat_requests.message_of(message, k, settings) for k, message in enumerate(messages)]
    with in_callers_words(body):
        return chat_request(_with_instructions([*earlier, *own], body.get("instructions")), named, is_json=True)


def without_instructions(messages: Sequence[Message], instructions: str | None) -> list[Message]:
    """A stored request's messages as its caller gave them: instructions hold for one response only."""
    if instructions is None or not messages:
        return list(messages)
    own = messages[0].text.removeprefix(instructions).removeprefix("\n\n")
    first = [messages[0].model_copy(update={"content": own})] if own else []
    return [*first, *messages[1:]]


def _with_instructions(messages: list[Any], instructions: str | None) -> list[Any]:
    """Instructions and a first system message are one: templates have room for one."""
    if not instructions:
        return messages
    first = messages[0]
    role, content = (first.role, first.text) if isinstance(first, Message) else (first["role"], first.get("content"))
    if role not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return [{"role": "system", "content": f"{instructions}\n\n{content or ''}"}, *messages[1:]]


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if not isinstance(value, Mapping | None):
        raise InvalidRequest(f"{name}: an object is needed.", param=name)
    return value or {}


def _format(wanted: Any) -> Shown:
    """``text.format`` as the chat API's response_format."""
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    return wanted if isinstance(wanted, dict) else {"type": wanted}


def _includes_logprobs(body: Mapping[str, Any]) -> bool:
    include = body.get("include")
    if include is None:
        return False
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        raise InvalidRequest("include: a list of strings is needed.", param="include")
    return _LOGPROBS in include


def _tools(body: Mapping[str, Any]) -> Shown:
    """Tools and tool_choice in the chat API's form: functions only."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if not isinstance(tools, list | None):
        raise InvalidRequest("tools: a list is needed.", param="tools")
    found = {}
    for k, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise InvalidRequest(
                f"tools[{k}]: only functions with a name are supported.", code="unsupported_parameter", param="tools"
            )
        found[tool["name"]] = {
            "type": "function",
            "function": {
                name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None
            },
        }
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        names = (
            [t.get("name") if isinstance(t, Mapping) else None for t in allowed] if isinstance(allowed, list) else []
        )
        if not names or any(name not in found for name in names):
            raise InvalidRequest("tool_choice: allowed_tools must be some of tools.", param="tool_choice")
        found, choice = {name: found[name] for name in names}, choice.get("mode", "auto")
    return {"tools": list(found.values()) or None, "tool_choice": choice}


def _is_metadata(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= 16
        and all(isinstance(v, str) and len(v) <= 512 and len(k) <= 64 for k, v in value.items())
    )
