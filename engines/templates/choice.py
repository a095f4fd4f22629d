"""Which tools a request offers, and whether the model has to call one (``tool_choice``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenfleet.engines.templates.tools import bare, definitions
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Offer:
    """``forced``: the name of the tool that must be called, "" for any of them, None for the model's own choice."""

    tools: tuple[dict[str, Any], ...] | None = None
    forced: str | None = None


def offer(request: ChatRequest) -> Offer:
    """An empty list of tools, or ``tool_choice="none"``, offers none. Raises `InvalidRequest`."""
    tools = definitions(request.tools) or None
    wanted = request.tool_choice
    if wanted == "none":
        return Offer()
    if wanted == "auto":
        return Offer(tools)
    if tools is None:
        raise InvalidRequest("tool_choice needs tools.", hint="Give tools, or leave it out.", param="tool_choice")
    if wanted == "required":
        return Offer(tools, "")
    if isinstance(wanted, Mapping) and wanted.get("type") == "function":
        function = wanted.get("function")
        name = function.get("name") if isinstance(function, Mapping) else wanted.get("name")
        known = [bare(tool)["name"] for tool in tools]
        if name in known:
            return Offer(tools, str(name))
        raise InvalidRequest(f"tool_choice names no tool of this request: {name!r}.", param="tool_choice")
    raise InvalidRequest(
        "tool_choice is none that is known.",
        hint='Use "auto", "none", "required" or {"type": "function", "function": {"name": ...}}.',
        param="tool_choice",
    )
