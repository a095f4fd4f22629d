"""Tool definitions and calls: checked, and written as a model's family was taught them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.schema import ToolFormat
from tokenfleet.wire.errors import InvalidRequest

Definition = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A call in the history. ``arguments`` is a JSON value, an object in all but odd cases."""

    name: str
    arguments: Any


def bare(tool: Definition) -> dict[str, Any]:
    """The function itself, out of OpenAI's wrapper (or OpenAI's newer flat form) if it is in one."""
    if tool.get("type") != "function":
        return dict(tool)
    inner = tool.get("function")
    return dict(inner) if isinstance(inner, Mapping) else {key: tool[key] for key in tool if key != "type"}


def wrapped(tool: Definition) -> dict[str, Any]:
    """The function within OpenAI's wrapper; one that is wrapped already stays as it is, order of keys included."""
    if tool.get("type") == "function" and "function" in tool:
        return dict(tool)
    return {"type": "function", "function": bare(tool)}


def definitions(tools: str | Sequence[Definition] | None) -> tuple[dict[str, Any], ...] | None:
    """``tools`` as a checked list: OpenAI's or LLaMA-Factory's bare ones, or JSON text of a list of either.

    None (or "") means that no tools were given. Raises `InvalidRequest` (param ``tools``)."""
    if tools is None or tools == "":
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise _wrong(f"tools is no JSON: {error}.") from error
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise _wrong("tools must be a list of definitions.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise _wrong(f"tools[{i}] must be an object.")
        function = bare(tool)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _wrong(f"tools[{i}] has no name.")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise _wrong(f"tools[{i}]: parameters must be a JSON schema (an object).")
    return tuple(dict(tool) for tool in tools)


def _wrong(message: str, param: str = "tools") -> InvalidRequest:
    hint = 'Give [{"type": "function", "function": {"name": ..., "parameters": {...}}}, ...].'
    return InvalidRequest(message, hint=hint, param=param)


def describe(style: ToolFormat, tools: Sequence[Definition], now: datetime | None, date_string: str | None) -> str:
    """The text that tells the model its tools; "" for an empty list. llama3's names today's date."""
    if not tools:
        return ""
    context = {
        "tools": list(tools),
        "bare": [bare(tool) for tool in tools],
        "wrapped": [wrapped(tool) for tool in tools],
        "today": date_string or (now or datetime.now().astimezone()).strftime("%d %b %Y"),
    }
    try:
        return sandbox.render(sandbox.snippet(style.definitions), context, now)
    except (jinja2.TemplateError, TypeError, AttributeError, ValueError) as error:
        raise _wrong(f"The tools can't be described in the {style.name} format: {error}.") from error


def write_calls(style: ToolFormat, calls: Sequence[Call], param: str) -> str:
    """The calls as an answer would hold them. Raises `InvalidRequest` for arguments that the format can't hold."""
    for call in calls:
        if style.needs_object and not isinstance(call.arguments, dict):
            raise _wrong(f"The arguments of {call.name!r} must be a JSON object.", param)
    shown = [
        {"name": call.name, "arguments": call.arguments, "json": sandbox.to_json(call.arguments)} for call in calls
    ]
    return sandbox.render(sandbox.snippet(style.calls), {"calls": shown})


def read_call(value: Any, param: str) -> Call:
    """A call out of ``{"name": ..., "arguments": ...}``; arguments may be JSON text, as OpenAI's clients send."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise _wrong("A tool call needs a name and arguments.", param)
    if "arguments" not in value:
        raise _wrong(f"The call of {value['name']!r} has no arguments.", param)
    arguments = value["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise _wrong(f"The arguments of {value['name']!r} are no JSON: {error}.", param) from error
    return Call(value["name"], arguments)
