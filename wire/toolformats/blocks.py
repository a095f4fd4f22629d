"""Calls between marks, as JSON (Qwen, MiniMax-M1, DeepSeek) or like XML (Qwen 3.5, Seed, MiniMax-M2, GLM-4.5)."""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenfleet.wire.toolformats.base import (
    Calls,
    FunctionCall,
    NoCall,
    Outcome,
    Reader,
    as_json,
    beginning_of,
    calls_of,
    is_in_string,
    strict_json,
    value_of,
)


def block(
    opened: str,
    closed: str,
    parse: Callable[[str], tuple[FunctionCall, ...]],
    begins: str = r"[{\[]",
    *,
    may_stay_open: bool = False,
) -> Reader:
    """Calls between two marks. A closing mark inside a JSON string doesn't close.

    ``begins`` is what must follow the opening mark, blanks apart: a mark that is only spoken of is text at once.
    ``may_stay_open``: the answer's end closes as well."""
    likely = re.compile(rf"{re.escape(opened)}\s*(?:{begins}|$)", re.DOTALL)

    def read(text: str, is_final: bool) -> Outcome:
        if not likely.match(text):
            return NoCall(len(opened))
        end = text.find(closed, len(opened))
        while end >= 0:
            inner = text[len(opened) : end]
            if calls := parse(inner):
                return Calls(calls, end + len(closed))
            if not is_in_string(inner):
                return NoCall(end + len(closed))
            end = text.find(closed, end + 1)
        calls = parse(text[len(opened) :]) if is_final and may_stay_open else ()
        return Calls(calls, len(text)) if calls else None

    return Reader((opened,), read, (closed,))


def json_lines(inner: str) -> tuple[FunctionCall, ...]:
    return tuple(call for line in inner.split("\n") if line.strip() for call in calls_of(line))


_INVOKE = re.compile(r'<invoke name="(.*?)">(.*?)</invoke>', re.DOTALL)
_INVOKE_PARAMETER = re.compile(r'<parameter name="(.*?)">(.*?)</parameter>', re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(.*?)>(.*?)</parameter>", re.DOTALL)


def _arguments(pairs: list[tuple[str, str]], *, is_stripped: bool = False) -> str:
    values = {key: value_of(text.strip() if is_stripped else text) for key, text in pairs}
    return as_json(values)


def invokes(inner: str) -> tuple[FunctionCall, ...]:
    found = _INVOKE.findall(inner)
    return tuple(FunctionCall(name.strip(), _arguments(_INVOKE_PARAMETER.findall(body))) for name, body in found)


def functions(opened: str, closed: str, *, is_stripped: bool) -> Reader:
    """``<function=NAME> <parameter=KEY>VALUE</parameter> ... </function>`` between two marks."""
    head = re.compile(rf"{re.escape(opened)}\s*<function=\s*([^\s<>]+)>?")
    start = re.compile(rf"{re.escape(opened)}\s*{beginning_of('<function=')}")
    tail = re.compile(rf"</function>\s*{re.escape(closed)}")

    def read(text: str, is_final: bool) -> Outcome:
        named = head.match(text)
        end = tail.search(text)
        if named and end:
            pairs = _PARAMETER.findall(text[named.end() : end.start()])
            return Calls((FunctionCall(named[1], _arguments(pairs, is_stripped=is_stripped)),), end.end())
        is_possible = named or start.fullmatch(text) or re.match(rf"{re.escape(opened)}\s*<function=", text)
        return None if is_possible else NoCall(len(opened))

    return Reader((opened,), read, (closed,))


_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_XML_NAME = re.compile(r"\s*([^\s<>{}\[\]\"]+)\s*")


def _arg_pairs(inner: str) -> tuple[FunctionCall, ...]:
    """GLM-4.5's ``NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ...``, or Qwen's JSON."""
    if inner.lstrip().startswith("{"):
        return calls_of(inner)
    named = _XML_NAME.match(inner)
    if named is None:
        return ()
    pairs, at = [], named.end()
    while pair := _PAIR.match(inner, at):
        pairs.append((pair[1], pair[2]))
        at = pair.end()
    return () if inner[at:].strip() else (FunctionCall(named[1], _arguments(pairs)),)


_closed_pairs = block("<tool_call>", "</tool_call>", _arg_pairs, r"\{|[^\s<>{}\[\]\"]+\s*(?:<|$)")


def read_glm4_moe(text: str, is_final: bool) -> Outcome:
    """Calls may lack ``</tool_call>``: LLaMA-Factory writes none, so models trained with it don't either."""
    opened, closed = "<tool_call>", "</tool_call>"
    outcome = _closed_pairs.read(text, is_final)
    following = text.find(opened, len(opened))
    until = outcome.end if outcome else len(text)
    if 0 < following < until and (calls := _arg_pairs(text[len(opened) : following])):
        return Calls(calls, following)
    if outcome is None and is_final:
        inner = re.sub(rf"\s*{beginning_of(closed)}$", "", text[len(opened) :])
        if calls := _arg_pairs(inner):
            return Calls(calls, len(text))
    return outcome


_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^\s<｜]+)(?:<｜tool▁sep｜>|\s*```json\s*)(.*?)(?:\s*```)?"
    r"\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)


def deepseek(inner: str) -> tuple[FunctionCall, ...]:
    try:
        found = [(name, strict_json(text)) for name, text in _DEEPSEEK_CALL.findall(inner)]
    except (ValueError, RecursionError):
        return ()
    return tuple(FunctionCall(name, as_json(value)) for name, value in found)


_HARMONY_HEAD = re.compile(r"<\|channel\|>commentary to=functions\.([\w.-]+).*?<\|message\|>", re.DOTALL)
_HARMONY_END = re.compile(r"<\|call\|>|<\|end\|>|<\|return\|>")


def read_harmony(text: str, is_final: bool) -> Outcome:
    """gpt-oss: ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>JSON<|call|>``.

    ``<|call|>`` ends the answer, and as a stop token it has no text: the answer's end counts as well."""
    head = _HARMONY_HEAD.match(text)
    if head is None:
        return None
    end = _HARMONY_END.search(text, head.end())
    if end is None and not is_final:
        return None
    after = end.end() if end else len(text)
    try:
        value = strict_json(text[head.end() : end.start() if end else len(text)])
    except (ValueError, RecursionError):
        return NoCall(after)
    return Calls((FunctionCall(head[1], as_json(value)),), after)


def dropped(*marks: str) -> Reader:
    """Headers that stand around the content and are no part of it."""

    def read(text: str, is_final: bool) -> Outcome:
        return Calls((), next(len(mark) for mark in marks if text.startswith(mark)))

    return Reader(marks, read)
