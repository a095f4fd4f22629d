"""Jinja in an immutable sandbox, under a limit of time and of size.

`snippets` compiles our own short templates, `chat_template` the one that a model brings along: the same environment as
transformers' `apply_chat_template` (its filters, globals, blank handling and the ``generation`` tag), plus the limits.
A template can't be stopped from outside its thread, so the limits sit inside: every round of a loop and every macro
call looks at the clock, and whatever makes a string or list longer looks at its size (`limits`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tokenfleet.engines.templates.limits import (
    MAX_CHARS,
    LimitExceeded,
    SilentNamespace,
    Weights,
    bounded,
    check_format,
    check_method,
    check_operator,
    limited,
)

__all__ = ["MAX_CHARS", "LimitExceeded", "Refused", "chat_template", "render", "snippet", "to_json"]

MAX_RENDER_S = 2.0


class Refused(Exception):
    """The template itself refuses this conversation (``raise_exception``)."""


@dataclass(slots=True)
class _Budget:
    ends_s: float = field(default_factory=lambda: time.monotonic() + MAX_RENDER_S)
    now: datetime = field(default_factory=lambda: datetime.now().astimezone())
    weights: Weights = field(default_factory=Weights)

    def tick(self) -> None:
        if time.monotonic() > self.ends_s:
            raise LimitExceeded(f"the chat template ran longer than {MAX_RENDER_S:g} s")


_budget: ContextVar[_Budget] = ContextVar("render budget")


def _weights() -> Weights:
    budget = _budget.get(None)  # a filter of constants is computed while a template is compiled
    return Weights() if budget is None else budget.weights


class _Guards(NodeTransformer):
    """Puts a look at the clock into every loop and macro, and one at the size around every ``~`` and every list."""

    @staticmethod
    def _tick(lineno: int) -> nodes.Output:
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        return nodes.Output([call], lineno=lineno)

    def _guard_body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, self._tick(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _guard_body  # noqa: N815 # jinja2 looks for these names

    def _bound(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the names on the left of an assignment
            return node
        return nodes.Call(nodes.EnvironmentAttribute("bounded"), [node], [], None, None, lineno=node.lineno)

    visit_Concat = visit_List = visit_Tuple = visit_Dict = _bound  # noqa: N815


class _Generation(Extension):
    """``{% generation %}`` marks an assistant's text for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guards().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def tick(self) -> str:
        _budget.get().tick()
        return ""

    def bounded(self, value: Any) -> Any:
        return bounded(value, _weights())

    def call(self, context: Any, obj: Any, /, *args: Any, **named: Any) -> Any:
        weights = _weights()
        if isinstance(obj, BuiltinMethodType):
            if obj.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])  # a generator's length is not known before
            check_method(obj.__self__, obj.__name__, args, weights)
        return bounded(super().call(context, obj, *args, **named), weights)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatting = super().wrap_str_format(value)
        if formatting is None:
            return None

        def checked(*args: Any, **named: Any) -> str:
            check_format(value.__self__, args, named, _weights())
            return formatting(*args, **named)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        weights = _weights()
        check_operator(operator, left, right, weights)
        result = super().call_binop(context, operator, left, right)
        if operator == "+":
            weights.note_sum(left, right, result)
        return bounded(result, weights)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a prompt: not HTML-escaped and in the keys' own order, unlike Jinja's own ``tojson``."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refused(str(message))


def _strftime_now(pattern: str) -> str:
    return _budget.get().now.strftime(pattern)


def _environment(**options: Any) -> _Sandbox:
    env = _Sandbox(extensions=[_Generation, "jinja2.ext.loopcontrols"], **options)
    env.filters["tojson"] = to_json
    env.filters |= {name: limited(name, wanted, _weights) for name, wanted in env.filters.items()}
    del env.globals["lipsum"]  # makes text without end
    env.globals.update(namespace=SilentNamespace, raise_exception=_raise_exception, strftime_now=_strftime_now)
    return env


_snippets = _environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
_chat_templates = _environment(trim_blocks=True, lstrip_blocks=True)


@lru_cache(maxsize=2048)
def snippet(source: str) -> jinja2.Template:
    """One of our own templates: blanks are kept as written, and an unknown name is an error."""
    return _snippets.from_string(source)


@lru_cache(maxsize=32)
def chat_template(source: str) -> jinja2.Template:
    """A model's own chat template, compiled as transformers does. Raises `jinja2.TemplateSyntaxError`."""
    return _chat_templates.from_string(source)


def render(template: jinja2.Template, context: dict[str, Any], now: datetime | None = None) -> str:
    """Raises `LimitExceeded`, `Refused`, or whatever the template's code runs into."""
    budget = _Budget(now=now) if now else _Budget()
    token = _budget.set(budget)
    try:
        parts, size = [], 0
        for part in template.generate(context):
            budget.tick()
            size += len(part)
            if size > MAX_CHARS:
                raise LimitExceeded(f"the chat template made more than {MAX_CHARS} characters")
            parts.append(part)
        return "".join(parts)
    finally:
        _budget.reset(token)
