"""Messages as the turns that named templates know: who may follow whom, calls and results read out of their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenfleet.engines.templates.tools import Call, read_call
from tokenfleet.wire.chat import Message
from tokenfleet.wire.errors import InvalidRequest

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "observation")


@dataclass(frozen=True, slots=True)
class Turn:
    """``text`` stands before the ``calls`` in an assistant's turn; ``results`` are a tool turn's only content.

    ``param`` names the message for errors."""

    role: Literal["user", "assistant", "tool"]
    text: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()
    reasoning: str = ""
    param: str = "messages"

    @property
    def content(self) -> str:
        return "\n".join(self.results) if self.role == "tool" else self.text


def split_system(messages: Sequence[Message], system: str | None) -> tuple[str | None, list[Message]]:
    """(system text, the other messages): a first message of role system is as good as ``system``, but not both."""
    if not messages:
        raise _wrong("messages must not be empty.", "messages")
    if messages[0].role not in SYSTEM_ROLES:
        return system, list(messages)
    if system is not None:
        hint = "Give system or a first system message, not both."
        raise InvalidRequest("There are two system texts.", hint=hint, param="system")
    return messages[0].text, list(messages[1:])


def check_last(messages: Sequence[Message]) -> None:
    """The assistant must be next. Raises `InvalidRequest`."""
    if not messages or messages[-1].role not in ("user", *TOOL_ROLES):
        raise _wrong("The last message must be a user's or a tool's: there is nothing to answer.", "messages")


def check_order(messages: Sequence[Message]) -> None:
    """Users or tools and the assistant take turns, and the assistant is next. Raises `InvalidRequest`."""
    is_assistants = False
    for i, message in enumerate(messages):
        param = f"messages[{i}].role"
        if message.role in SYSTEM_ROLES:
            raise _wrong("Only the first message may be a system message.", param)
        if message.role in ("assistant", "function"):
            if not is_assistants:
                raise _wrong(f"Role {message.role!r} must follow a user's or a tool's message.", param)
            is_assistants = False
        elif is_assistants and not (message.role in TOOL_ROLES and messages[i - 1].role in TOOL_ROLES):
            raise _wrong(f"Role {message.role!r} can't follow {messages[i - 1].role!r}: the assistant is next.", param)
        else:
            is_assistants = True
    check_last(messages)


def _wrong(message: str, param: str) -> InvalidRequest:
    hint = "The order is [system], user, assistant, user, ...; tool results follow the calls they answer."
    return InvalidRequest(message, hint=hint, param=param)


def turns(
    messages: Sequence[Message],
    text_of: Callable[[Message], str],
    thoughts: tuple[str, str],
    call_words: tuple[str, str],
    clean: Callable[[str], str] = str,
) -> list[Turn]:
    """``messages`` (without the system's) as turns; results in a row are one. ``clean`` goes over assistants' texts."""
    found: list[Turn] = []
    for i, message in enumerate(messages):
        param, text = f"messages[{i}]", text_of(message)
        if message.role in TOOL_ROLES:
            if found and found[-1].role == "tool":
                found[-1] = replace(found[-1], results=(*found[-1].results, text))
            else:
                found.append(Turn("tool", results=(text,), param=param))
        elif message.role == "user":
            found.append(Turn("user", text, param=param))
        elif message.role == "function":
            found.append(function_turn(clean(text), thoughts, call_words, f"{param}.content"))
        else:
            calls = tuple(
                read_call(call.function.model_dump(), f"{param}.tool_calls[{j}].function.arguments")
                for j, call in enumerate(message.tool_calls)
            )
            text = clean(text)
            text = text + "\n" if text and calls else text
            found.append(Turn("assistant", text, calls, reasoning=message.reasoning_content or "", param=param))
    return found


def function_turn(content: str, thoughts: tuple[str, str], call_words: tuple[str, str], param: str) -> Turn:
    """LLaMA-Factory's ``function`` message: JSON of a call or a list of them, alone, after thoughts, or marked.

    Thoughts in other words than the template's become its ``reasoning``."""
    marked = _between(call_words)
    blocks = [match[1] for match in marked.finditer(content)]
    text = marked.sub("", content)
    reasoning = ""
    if not blocks:
        thought = _between(thoughts).search(content)
        text = thought[0] if thought else ""
        if thought is None and (foreign := _COMMON_THOUGHTS.match(content)):
            reasoning, content = foreign[1], content[foreign.end() :]
        blocks = [content.replace(text, "") if text else content]
    calls = tuple(call for block in blocks for call in _calls(block, param))
    return Turn("assistant", text, calls, reasoning=reasoning, param=param)


_COMMON_THOUGHTS = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)


def _calls(block: str, param: str) -> list[Call]:
    try:
        value: Any = json.loads(block)
    except ValueError as error:
        hint = 'Give {"name": ..., "arguments": {...}} or a list of these, or use tool_calls.'
        raise InvalidRequest(f"A function message must be JSON: {error}.", hint=hint, param=param) from error
    return [read_call(call, param) for call in (value if isinstance(value, list) else [value])]


def _between(words: tuple[str, str]) -> re.Pattern[str]:
    return re.compile(f"{re.escape(words[0])}(.*?){re.escape(words[1])}", re.DOTALL)


def without_thoughts(text: str, thoughts: tuple[str, str]) -> str:
    """``text`` less what stands between the two marks, and less the line breaks that it then begins with."""
    return _between(thoughts).sub("", text).lstrip("\n")
