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


def call_grammar(style: ToolFormat, offered: Offer, opening: str, *, is_parallel: bool) -> str:
    """In Lark's form as llguidance reads it; "" for a format whose arguments are not written as JSON.

    A call of a named tool is one call; of any tool (``offered.forced == ""``) several may follow one another."""
    tools = [tool for tool in map(bare, offered.tools or ()) if offered.forced in ("", tool["name"])]
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
