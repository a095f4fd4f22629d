"""A conversation as the pieces of text and special tokens that a named template makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.conversation import Turn
from tokenfleet.engines.templates.schema import Part, Slot, Template, tool_format
from tokenfleet.engines.templates.tools import Definition, describe, write_calls
from tokenfleet.wire.errors import InvalidRequest

Piece = str | Slot
"""Text that is tokenised by itself, or one special token."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """``enable`` True leaves it to the model; False and None answer for it that there are no thoughts. ``preserve``
    keeps the thoughts of earlier answers."""

    enable: bool | None = True
    preserve: bool = False


def _fill(parts: Sequence[Part], **context: Any) -> list[Piece]:
    pieces = [part if isinstance(part, Slot) else sandbox.render(sandbox.snippet(part), context) for part in parts]
    return [piece for piece in pieces if piece != ""]


def _fill_text(parts: Sequence[Part], **context: Any) -> str:
    return "".join(piece for piece in _fill(parts, **context) if isinstance(piece, str))


def pieces(
    template: Template,
    turns: Sequence[Turn],
    *,
    system: str | None = None,
    tools: Sequence[Definition] | None = None,
    thinking: Thinking = Thinking(),
    now: datetime | None = None,
    date_string: str | None = None,
) -> list[Piece]:
    """The prompt up to where the assistant speaks. ``system`` None or "" means the template's default one.

    ``tools`` may be an empty list: as in LLaMA-Factory that still makes a system turn."""
    style = tool_format(template.tool_format)
    system = system or template.default_system
    result = _fill(template.prefix)
    in_user = ""
    if system or tools is not None:
        system += describe(style, tools or (), now, date_string)
        if template.is_system_in_user:
            in_user = _fill_text(template.system, content=system)
        else:
            result += _fill(template.system, content=system)
    if in_user and turns[0].role != "user":
        raise InvalidRequest(
            f"With the {template.name} template the first message must be a user's: it carries the system text.",
            param="messages[0].role",
        )
    for i, turn in enumerate(turns):
        match turn.role:
            case "user":
                result += _fill(template.user, content=in_user + turn.text if i == 0 else turn.text)
            case "tool":
                result += _fill(template.tool, content=turn.content, results=list(turn.results))
            case "assistant":
                thoughts = turn.reasoning if thinking.preserve else ""
                text = f"{template.thoughts[0]}{thoughts}{template.thoughts[1]}{turn.text}" if thoughts else turn.text
                if turn.calls:
                    result += _fill(template.call, content=text + write_calls(style, turn.calls, turn.param))
                else:
                    result += _fill(template.assistant, content=text)
    if template.is_reasoning and not thinking.enable:
        result.append(template.no_thoughts)
    return result
