"""A grammar for the rest of a call that a prompt has begun: names of the offered tools, arguments by their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.schema import ToolFormat
from tokenfleet.engines.templates.tools import Call, bare, write_calls

_ARGUMENTS = {"__arguments__": 0}
_NAME = "__name__"


def call_grammar(style: ToolFormat, offered: Offer, opening: str, *, is_parallel: bool) -> str:
    """In Lark's form as llguidance reads it; "" for a format whose arguments are not written as JSON.

    A call of a named tool is one call; of any tool (``offered.forced == ""``) several may follow one another."""
    tools = _callable(offered)
    mark = sandbox.to_json(_ARGUMENTS)
    rules: list[str] = []
    heads: list[str] = []
    end = ""
    for k, tool in enumerate(tools):
        head, found, end = write_calls(style, [Call(tool["name"], _ARGUMENTS)], "tools").partition(mark)
        if not found or not head.startswith(opening) or mark in end:
            return ""
        heads.append(f"{_text(head[len(opening) :])} args{k}")
        rules.append(f"args{k}: %json {_schema(tool.get('parameters'))}")
    more = _more(style, tools, mark, end) if is_parallel and offered.forced == "" else []
    start = "start: first" + (" more*" if more else "") + (f" {_text(end)}" if end else "")
    rules += [f"more: {' | '.join(more)}"] if more else []
    return "\n".join([start, f"first: {' | '.join(heads)}", *rules])


def call_forms(style: ToolFormat, offered: Offer, *, is_parallel: bool) -> dict[str, Any] | None:
    """The text around names and arguments of the calls that `call_grammar` allows, for `wire.toolformats.ForcedCalls`;
    None if it is not the same for all tools."""
    tools = _callable(offered)
    names = [tool["name"] for tool in tools]
    mark = sandbox.to_json(_ARGUMENTS)

    def before_arguments(number: int, *called: str) -> str:
        return write_calls(style, [Call(name, _ARGUMENTS) for name in called], "tools").split(mark)[number]

    first = before_arguments(0, _NAME).split(_NAME)
    if len(first) != 2 or any(before_arguments(0, name) != name.join(first) for name in names):
        return None
    more = None
    end = write_calls(style, [Call(names[0], _ARGUMENTS)], "tools").partition(mark)[2]
    if is_parallel and offered.forced == "" and _more(style, tools, mark, end):
        more = before_arguments(1, names[0], _NAME).split(_NAME)
    return {"names": names, "first": first, "more": more if more and len(more) == 2 else None}


def _callable(offered: Offer) -> list[dict[str, Any]]:
    return [tool for tool in map(bare, offered.tools or ()) if offered.forced in ("", tool["name"])]


def _more(style: ToolFormat, tools: list[dict[str, Any]], mark: str, end: str) -> list[str]:
    """What stands before the arguments of each tool when another call came first; [] if the format is another then."""
    single = write_calls(style, [Call(tools[0]["name"], _ARGUMENTS)], "tools").partition(mark)[0]
    found = []
    for k, tool in enumerate(tools):
        both = write_calls(style, [Call(tools[0]["name"], _ARGUMENTS), Call(tool["name"], _ARGUMENTS)], "tools")
        parts = both.split(mark)
        if len(parts) != 3 or parts[0] != single or parts[2] != end:
            return []
        found.append(f"{_text(parts[1])} args{k}")
    return found


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(parameters: Any) -> str:
    """What a grammar can't express of a schema is left to the model."""
    schema = dict(parameters) if isinstance(parameters, Mapping) and parameters else {"type": "object"}
    return json.dumps({"x-guidance": {"lenient": True}, **schema}, ensure_ascii=False)
