"""The chat template that a model brings along, rendered as transformers' `apply_chat_template` does.

Where it knows nothing of tools, a request's tools would be lost in silence: then they are told in the system text and
calls and results become ordinary messages, in LLaMA-Factory's "default" tool format (`tools_as_text`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.conversation import function_turn, turns
from tokenfleet.engines.templates.media import Placement, split, text_of
from tokenfleet.engines.templates.sandbox import to_json
from tokenfleet.engines.templates.schema import tool_format
from tokenfleet.engines.templates.tokens import Tokenizer
from tokenfleet.engines.templates.tools import Definition, describe, read_call, wrapped, write_calls
from tokenfleet.wire.chat import Message
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"})


THOUGHTS = ("<think>\n", "\n</think>\n\n")
CALL_WORDS = ("<tool_call>", "</tool_call>")


def source_of(tokenizer: Tokenizer, *, has_tools: bool = False) -> str | None:
    """The Jinja source that serves a request; models with several have one for tools. None if there is none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, list):  # as older tokenizer_config.json files write it
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, Mapping):
        found = found.get("tool_use" if has_tools and "tool_use" in found else "default")
    return found if isinstance(found, str) else None


def _compiled(source: str) -> jinja2.Template:
    try:
        return sandbox.chat_template(source)
    except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError, MemoryError) as error:  # Python compiles it, too
        raise ConfigurationError(f"The model's chat template is broken: {error}.", param="template") from error


@lru_cache(maxsize=32)
def _tree(source: str) -> nodes.Template:
    return _compiled(source).environment.parse(source)


@lru_cache(maxsize=32)
def knows_tools(source: str) -> bool:
    return any(name.name == "tools" for name in _tree(source).find_all(nodes.Name))


@lru_cache(maxsize=32)
def _walks_parts(source: str) -> bool:
    """Whether a loop goes over a message's content (templates of multimodal models have one)."""

    def names(node: nodes.Node) -> set[object]:
        inside = [node, *node.find_all(nodes.Node)]
        found: set[object] = {n.attr for n in inside if isinstance(n, nodes.Getattr)}
        found |= {n.name for n in inside if isinstance(n, nodes.Name)}
        return found | {n.arg.value for n in inside if isinstance(n, nodes.Getitem) and isinstance(n.arg, nodes.Const)}

    return any("content" in names(loop.iter) for loop in _tree(source).find_all(nodes.For))


def _content(message: Message, source: str, placement: Placement) -> str | list[dict[str, str]]:
    """Text where the template takes it, parts where it can only walk through them or where there are media."""
    if not _walks_parts(source):
        return text_of(message, placement)
    return text_of(message, placement) if "is string" in source and not placement.media else split(message, placement)


@lru_cache(maxsize=32)
def _joins_arguments(source: str) -> bool:
    """Whether a call's arguments are added to a text as they are (DeepSeek's templates), so must be text."""

    def is_arguments(node: nodes.Expr) -> bool:
        key = node.arg if isinstance(node, nodes.Getitem) else None
        name = key.value if isinstance(key, nodes.Const) else getattr(node, "attr", None)
        return name == "arguments"

    tree = _tree(source)
    added = [side for node in tree.find_all(nodes.Add) for side in (node.left, node.right)]
    return any(map(is_arguments, [*added, *(side for node in tree.find_all(nodes.Concat) for side in node.nodes)]))


def as_dicts(messages: Sequence[Message], source: str, placement: Placement) -> list[dict[str, Any]]:
    """``messages`` in the form that chat templates on the hub expect: arguments of calls are objects, not text."""
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = {"observation": "tool", "function": "assistant"}.get(message.role, message.role)
        if role == "developer" and "developer" not in source:
            role = "system"
        entry: dict[str, Any] = {"role": role, "content": _content(message, source, placement)}
        calls = [
            (call.id, read_call(call.function.model_dump(), f"messages[{i}].tool_calls")) for call in message.tool_calls
        ]
        if message.role == "function":
            turn = function_turn(message.text, THOUGHTS, CALL_WORDS, f"messages[{i}].content")
            entry["content"] = turn.text
            calls = [(f"call{i:03d}{j:02d}", call) for j, call in enumerate(turn.calls)]
        if calls:
            as_text = to_json if _joins_arguments(source) else None
            entry["tool_calls"] = [
                {
                    "id": made,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": as_text(call.arguments) if as_text else call.arguments,
                    },
                }
                for made, call in calls
            ]
            if message.content is None and _IS_NONE.search(source):
                entry["content"] = None
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(message, key)) is not None:
                entry[key] = value
        result.append(entry)
    return result


# Some templates tell an answer with calls by its content being none, others stumble over that.
_IS_NONE = re.compile(r"content['\"\]]*\s+is\s+none")


def loses_tools(messages: Sequence[Message], source: str, *, has_tools: bool) -> bool:
    """Whether the template would drop the request's tools, or the calls in it, in silence."""
    has_calls = any(message.tool_calls or message.role == "function" for message in messages)
    return (has_tools and not knows_tools(source)) or (has_calls and "tool_calls" not in source)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    now: datetime | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt's text. Raises `InvalidRequest` where the template refuses or can't render the conversation."""
    source = source_of(tokenizer, has_tools=bool(tools))
    if source is None:
        raise InvalidRequest(
            "This model has no chat template.",
            hint="Start its worker with --template NAME (docs/templates.md), or send a prompt instead of messages.",
            param="messages",
        )
    if taken := RESERVED & (options or {}).keys():
        raise InvalidRequest(f"template_kwargs can't set {sorted(taken)}.", param="template_kwargs")
    context = {**tokenizer.special_tokens_map, **(options or {}), "messages": messages, "documents": None}
    context |= {"tools": [wrapped(tool) for tool in tools] if tools else None}
    context |= {"add_generation_prompt": add_generation_prompt}
    template = _compiled(source)
    try:
        return sandbox.render(template, context, now)
    except sandbox.Refused as error:
        message = f"The model's chat template refuses this conversation: {error}"
    except sandbox.LimitExceeded as error:
        message = f"The prompt can't be rendered: {error}."
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        message = f"The model's chat template fails on this conversation: {type(error).__name__}: {error}"
    except RecursionError:
        message = "The prompt can't be rendered: the conversation is nested too deeply."
    except MemoryError:
        message = "The prompt can't be rendered: there is no memory for what the chat template makes."
    raise InvalidRequest(message, hint="Check roles, their order and tools.", param="messages")


def tools_as_text(
    messages: Sequence[Message], system: str, tools: Sequence[Definition] | None, now: datetime | None
) -> list[Message]:
    """``messages`` (without a system's) with tools, calls and results told in words; results in a row are one."""
    style = tool_format("default")
    told = system + describe(style, tools or (), now, None)
    result = [Message(role="system", content=told)] if told else []
    for turn in turns(messages, lambda message: message.text, THOUGHTS, CALL_WORDS):
        if turn.calls:
            text = turn.text + write_calls(style, turn.calls, turn.param)
            result.append(Message(role="assistant", content=text, reasoning_content=turn.reasoning or None))
        elif turn.role == "tool":
            result.append(Message(role="user", content=turn.content))
        else:
            result.append(Message(role=turn.role, content=turn.text, reasoning_content=turn.reasoning or None))
    return result


def system_in_user(messages: Sequence[Message]) -> list[Message]:
    """The system text moved into the first user's message, for templates that refuse a system's."""
    system, first, *others = messages
    return [first.model_copy(update={"content": f"{system.text}\n\n{first.text}"}), *others]
