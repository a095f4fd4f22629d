"""Input items of the Responses API as chat messages and as they are listed again, and what a request's echo says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from tokenfleet.wire.errors import InvalidRequest

Shown = dict[str, Any]

_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_ROLES = ("user", "system", "developer", "assistant")
_KEPT_DATA_CHARS = 256


@dataclass(frozen=True)
class Asked:
    """A request's body, as the ledger keeps it beside the job to show it again."""

    body: Mapping[str, Any]

    @classmethod
    def stored(cls, data: bytes) -> Asked:
        return cls(msgspec.json.decode(data))

    def dump(self) -> bytes:
        """Without media that lie in it: those are kept elsewhere, and for the job only."""
        return msgspec.json.encode(_without_media(self.body))

    @property
    def background(self) -> bool:
        return bool(self.body.get("background"))

    @property
    def store(self) -> bool:
        return self.body.get("store") is not False

    @property
    def instructions(self) -> str | None:
        return self.body.get("instructions")

    @cached_property
    def echo(self) -> Shown:
        """What a response repeats of its request."""
        body = self.body
        text = body.get("text") or {}
        reasoning = body.get("reasoning") or {}
        return {
            "model": body["model"],
            "instructions": self.instructions,
            "background": self.background,
            "store": self.store,
            "metadata": body.get("metadata") or {},
            "tools": body.get("tools") or [],
            "tool_choice": body.get("tool_choice") or "auto",
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
            "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
            "top_logprobs": body.get("top_logprobs") or 0,
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": body.get("max_tool_calls"),
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "text": {"format": text.get("format") or {"type": "text"}},
            "truncation": "disabled",
            "service_tier": "default",
            "user": body.get("user"),
        }

    def input_items(self, job_id: str) -> list[Shown]:
        """Its input, in order, each with an id that follows from the job and its place."""
        given = self.body["input"]
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        return [_listed(item, job_id, place) for place, item in enumerate(items)]


def item_id(kind: str, job_id: str, place: int, side: str = "output") -> str:
    digest = hashlib.blake2b(f"{job_id}:{side}:{place}".encode(), digest_size=12).hexdigest()
    return f"{_PREFIX.get(kind, 'item')}_{digest}"


def response_error(code: str, message: str) -> Shown:
    """OpenAI's list of codes is closed; our own stands before the message."""
    return {"code": "server_error", "message": f"{code}: {message}"}


def messages_of(given: Any) -> list[Shown]:
    """``input`` as chat messages: an assistant's thoughts, text and calls in a row are one message of his.

    Raises `InvalidRequest` with the item that is wrong."""
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input: a string or a list of items is needed.", param="input")
    messages: list[Shown] = []
    for index, item in enumerate(given):
        param = f"input[{index}]"
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{param}: an object is needed.", param=param)
        _append(messages, item, param)
    if messages and messages[-1].get("role") == "assistant" and not messages[-1].keys() & {"content", "tool_calls"}:
        raise InvalidRequest("input: it ends with thoughts that nothing follows.", param="input")
    return messages


def _append(messages: list[Shown], item: Mapping[str, Any], param: str) -> None:
    match item.get("type", "message"):
        case "message" if item.get("role") == "assistant":
            _assistant(messages, "content")["content"] = _text_of(item.get("content"), f"{param}.content")
        case "message" if item.get("role") in _ROLES:
            messages.append({"role": item["role"], "content": _content(item.get("content"), f"{param}.content")})
        case "function_call":
            function = {"name": _string(item, "name", param), "arguments": _string(item, "arguments", param)}
            call = {"id": _string(item, "call_id", param), "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            content = _content(item.get("output"), f"{param}.output")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", param), "content": content})
        case "reasoning":
            parts = item.get("content") or item.get("summary") or []
            _assistant(messages, "reasoning_content")["reasoning_content"] = _text_of(parts, f"{param}.content")
        case "message":
            raise InvalidRequest(f"{param}.role: one of {', '.join(_ROLES)} is needed.", param=param)
        case other:
            raise InvalidRequest(
                f"{param}: items of type {str(other)[:64]!r} are not supported.", code="unsupported_parameter",
                param=param,
            )  # fmt: skip


def _assistant(messages: list[Shown], field: str = "") -> Shown:
    """The assistant's message that goes on here: the last, unless it has ``field`` (or what follows it) already."""
    later = {"content": {"content", "tool_calls"}, "reasoning_content": {"content", "tool_calls", "reasoning_content"}}
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].keys() & later.get(field, set()):
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(content: Any, param: str) -> Any:
    """Text, or parts in the chat API's words."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{param}: a string or a list of parts is needed.", param=param)
    return [_part(part, f"{param}[{k}]") for k, part in enumerate(content)]


def _part(part: Any, param: str) -> Shown:
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str() as text}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": str() as url}:
            return {"type": "image_url", "image_url": {"url": url, "detail": part.get("detail") or "auto"}}
        case {"type": "input_audio", "input_audio": audio}:
            return {"type": "input_audio", "input_audio": audio}
        case {"type": "input_video", "video_url": str() as url}:
            return {"type": "video_url", "video_url": {"url": url}}
        case {"type": kind}:
            raise InvalidRequest(
                f"{param}: parts of type {str(kind)[:64]!r} are not supported like this.", code="unsupported_media",
                param=param,
            )  # fmt: skip
        case _:
            raise InvalidRequest(f"{param}: an object with a type is needed.", param=param)


def _text_of(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{param}: a string or a list of parts is needed.", param=param)
    texts = []
    for part in content:
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise InvalidRequest(f"{param}: parts with text are needed.", param=param)
        texts.append(text)
    return "".join(texts)


def _string(item: Mapping[str, Any], name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}.{name}: a string is needed.", param=param)
    return value


def _listed(item: Mapping[str, Any], job_id: str, place: int) -> Shown:
    """An input item as ``GET …/input_items`` tells it."""
    kind = item.get("type", "message")
    made = item_id(kind, job_id, place, "input")
    if kind == "message":
        is_answer = item["role"] == "assistant"
        return {
            "id": item.get("id") or made, "type": "message", "role": item["role"], "status": "completed",
            "content": _listed_parts(item["content"], "output_text" if is_answer else "input_text"),
        }  # fmt: skip
    if kind == "reasoning":
        return {"summary": [], **item, "id": item.get("id") or made}
    return {**item, "id": item.get("id") or made, "status": item.get("status") or "completed"}


def _listed_parts(content: Any, text_kind: str) -> list[Shown]:
    if isinstance(content, str):
        content = [{"type": text_kind, "text": content}]
    parts = []
    for part in content:
        shown = dict(part)
        if shown.get("type") in ("text", "input_text", "output_text"):
            shown["type"] = text_kind
            if text_kind == "output_text":
                shown.setdefault("annotations", [])
        elif shown.get("type") == "input_image":
            shown.setdefault("detail", "auto")
        parts.append(shown)
    return parts


def _without_media(body: Mapping[str, Any]) -> Shown:
    given = body.get("input")
    if not isinstance(given, list):
        return dict(body)
    return {**body, "input": [_item_without_media(item) for item in given]}


def _item_without_media(item: Mapping[str, Any]) -> Shown:
    shown = dict(item)
    for name in ("content", "output"):
        if _is_list(shown.get(name)):
            shown[name] = [_part_without_media(part) for part in shown[name]]
    return shown


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _part_without_media(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    shown = dict(part)
    for name in ("image_url", "video_url"):
        if isinstance(shown.get(name), str) and len(shown[name]) > _KEPT_DATA_CHARS and shown[name].startswith("data:"):
            shown[name] = None
    if isinstance(shown.get("input_audio"), Mapping):
        shown["input_audio"] = {**shown["input_audio"], "data": ""}
    return shown


def page(items: Iterable[Shown], *, after: str | None, limit: int, order: str) -> Shown:
    """A page of a list, as OpenAI's lists are. Raises `InvalidRequest`."""
    listed = list(items)
    if order == "desc":
        listed.reverse()
    start = 0
    if after is not None:
        ids = [item["id"] for item in listed]
        if after not in ids:
            raise InvalidRequest("after: there is no such item.", param="after")
        start = ids.index(after) + 1
    shown = listed[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(listed),
    }
