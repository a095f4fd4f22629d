"""Calls in notations of their own: Python's (LFM2) and Gemma 4's."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from typing import Any

from tokenfleet.wire.toolformats.base import (
    Awaited,
    Calls,
    FunctionCall,
    NoCall,
    Outcome,
    as_json,
    beginning_of,
    strict_json,
)


def python_calls(inner: str) -> tuple[FunctionCall, ...]:
    """``[name(key=value, ...), ...]`` with Python's literals or JSON's."""
    try:
        body = ast.parse(_without_keywords(inner.strip()), mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return tuple(_python_call(node) for node in nodes)
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError, RecursionError, MemoryError):
        return ()


_ESCAPE = "ꙮ"  # a letter that no tool's name begins with


def _without_keywords(text: str) -> str:
    """Tools may have arguments called ``from`` or ``class``, which Python's grammar doesn't take for names."""
    if not re.search(rf"\b(?:{'|'.join(keyword.kwlist)})\s*[=(]", text):
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return tokenize.untokenize(
        (kind, _ESCAPE + name if kind == tokenize.NAME and keyword.iskeyword(name) and name.islower() else name)
        for kind, name, *_ in tokens
    )


class _Json(ast.NodeTransformer):
    """true, false and null are names to Python."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _python_call(node: ast.expr) -> FunctionCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for given in node.keywords:
        if given.arg is None:
            raise ValueError("not a call with named arguments")
        arguments[given.arg.removeprefix(_ESCAPE)] = ast.literal_eval(_Json().visit(given.value))
    return FunctionCall(node.func.id.removeprefix(_ESCAPE), as_json(arguments))


_GEMMA_HEAD = re.compile(r"<\|tool_call>call:([^{\s]+)\{")
_GEMMA_START = re.compile(rf"<\|tool_call>(?:{beginning_of('call:')}|call:[^{{\s]*)")
_GEMMA_TOKEN = re.compile(r'\s*(?:<\|"\|>(.*?)<\|"\|>|([{}\[\],:])|([^\s{}\[\],:<]+))\s*', re.DOTALL)


def read_gemma4(text: str, is_final: bool) -> Outcome:
    head = _GEMMA_HEAD.match(text)
    if head is None:
        return None if _GEMMA_START.fullmatch(text) else NoCall(len("<|tool_call>"))
    end = text.find("}<tool_call|>", head.end())
    if end < 0:
        return Awaited(("}<tool_call|>",))
    after = end + len("}<tool_call|>")
    try:
        arguments = _GemmaObject("{" + text[head.end() : end] + "}").value()
        return Calls((FunctionCall(head[1], as_json(arguments)),), after)
    except (ValueError, IndexError, RecursionError):
        return NoCall(after)


class _GemmaObject:
    """JSON whose strings stand between ``<|"|>`` marks and whose keys may stand bare."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, Any]] = []
        at = 0
        while at < len(text):
            token = _GEMMA_TOKEN.match(text, at)
            if token is None:
                raise ValueError("neither a mark nor a literal")
            string, sign, bare = token.groups()
            self._tokens.append(("text", string) if string is not None else ("sign", sign) if sign else ("bare", bare))
            at = token.end()
        self._at = 0

    def value(self) -> Any:
        value = self._value()
        if self._at != len(self._tokens):
            raise ValueError("text after the value")
        return value

    def _next(self) -> tuple[str, Any]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _is(self, sign: str) -> bool:
        is_it = self._tokens[self._at] == ("sign", sign)
        self._at += is_it
        return is_it

    def _value(self) -> Any:
        kind, text = self._next()
        if kind == "text":
            return text
        if kind == "bare":
            return strict_json(text)
        if text not in "{[":
            raise ValueError("a value is missing")
        closing = "}" if text == "{" else "]"
        items: list[Any] = []
        while not self._is(closing):
            if items and not self._is(","):
                raise ValueError("a comma is missing")
            items.append(self._pair() if text == "{" else self._value())
        return dict(items) if text == "{" else items

    def _pair(self) -> tuple[str, Any]:
        kind, key = self._next()
        if kind == "sign" or not self._is(":"):
            raise ValueError("a key is missing")
        return str(key).strip('"'), self._value()
