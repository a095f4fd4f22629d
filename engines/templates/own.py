"""The chat template that a model brings along, rendered as transformers' `apply_chat_template` does.

`parsed` is the other reading of it, LLaMA-Factory's for ``template: null``: probe it with a few messages and take the
answers apart into turns. It is offered as the template name ``parsed``, and used by itself where a request has tools
and the model's template knows none (tools would be lost in silence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.conversation import function_turn
from tokenfleet.engines.templates.media import Placement, split, text_of
from tokenfleet.engines.templates.tokens import Tokenizer
from tokenfleet.engines.templates.tools import read_call, wrapped
from tokenfleet.wire.chat import Message
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"})


THOUGHTS = ("<think>\n", "\n</think>\n\n")
_CALL_WORDS = ("<tool_call>", "</tool_call>")


def source_of(tokenizer: Tokenizer, *, has_tools: bool = False) -> str | None:
    """The Jinja source that serves a request; models with several have one for tools. None if there is none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, list):  # as older tokenizer_config.json files write it
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, Mapping):
        found = found.get("tool_use" if has_tools and "tool_use" in found else "default")
    return found if isinstance(found, str) else None


@lru_cache(maxsize=32)
def _tree(source: str) -> nodes.Template:
    return sandbox.chat_template(source).environment.parse(source)


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


def as_dicts(messages: Sequence[Message], source: str, placement: Placement) -> list[dict[str, Any]]:
    """``messages`` in the form that chat templates on the hub expect: arguments of calls are objects, not text."""
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = {"observation": "tool", "function": "assistant"}.get(message.role, message.role)
        if role == "developer" and "developer" not in source:
            role = "system"
        entry: dict[str, Any] = {"role": role, "content": _content(message, source, placement)}
        calls = [(call.id, read_call(call.function.model_dump(), _param(i))) for call in message.tool_calls]
        if message.role == "function":
            turn = function_turn(message.text, THOUGHTS, _CALL_WORDS, f"messages[{i}].content")
            entry["content"] = turn.text
            calls = [(f"call{i:03d}{j:02d}", call) for j, call in enumerate(turn.calls)]
        if calls:
            entry["tool_calls"] = [
                {"id": made, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for made, call in calls
            ]
            entry["content"] = None if message.content is None else entry["content"]
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(message, key)) is not None:
                entry[key] = value
        result.append(entry)
    return result


def _param(i: int) -> str:
    return f"messages[{i}].tool_calls"


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
    try:
        return sandbox.render(sandbox.chat_template(source), context, now)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigurationError(f"The model's chat template is broken: {error}.", param="template") from error
    except sandbox.Refused as error:
        message = f"The model's chat template refuses this conversation: {error}"
    except sandbox.LimitExceeded as error:
        message = f"The prompt can't be rendered: {error}."
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        message = f"The model's chat template fails on this conversation: {type(error).__name__}: {error}"
    except RecursionError:
        message = "The prompt can't be rendered: the conversation is nested too deeply."
    raise InvalidRequest(message, hint="Check roles, their order and tools.", param="messages")
