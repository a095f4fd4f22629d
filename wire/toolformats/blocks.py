"""Calls between marks, as JSON (Qwen, MiniMax-M1, DeepSeek) or like XML (Qwen 3.5, Seed, MiniMax-M2, GLM-4.5)."""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenfleet.wire.toolformats.base import (
    Awaited,
    Calls,
    FunctionCall,
    NoCall,
    Outcome,
    Reader,
    as_json,
    beginning_of,
    calls_of,
    is_in_string,
    sections,
    strict_json,
    value_of,
)

_MOST_CLOSINGS = 32
"""Closing marks in the strings of one call; with more of them it is text."""


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
        begun = likely.match(text)
        if not begun:
            return NoCall(len(opened))
        closings, end = 0, text.find(closed, len(opened))
        while end >= 0:
            inner, closings = text[len(opened) : end], closings + 1
            if calls := parse(inner):
                return Calls(calls, end + len(closed))
            if closings > _MOST_CLOSINGS or not is_in_string(inner):
                return NoCall(end + len(closed))
            end = text.find(closed, end + 1)
        calls = parse(text[len(opened) :]) if is_final and may_stay_open else ()
        if calls:
            return Calls(calls, len(text))
        return Awaited((closed,)) if begun.end() < len(text) else None

    return Reader((opened,), read, (closed,))


def json_lines(inner: str) -> tuple[FunctionCall, ...]:
    return tuple(call for line in inner.split("\n") if line.strip() for call in calls_of(line))


_INVOKE = re.compile(r'<invoke name="([^"]*)">')
_INVOKE_PARAMETER = re.compile(r'<parameter name="([^"]*)">')
_PARAMETER = re.compile(r"<parameter=([^>]*)>")


def _arguments(pairs: list[tuple[str, str]], *, is_stripped: bool = False) -> str:
    values = {key: value_of(text.strip() if is_stripped else text) for key, text in pairs}
    return as_json(values)


def invokes(inner: str) -> tuple[FunctionCall, ...]:
    return tuple(
        FunctionCall(name.strip(), _arguments(sections(body, _INVOKE_PARAMETER, "</parameter>")))
        for name, body in sections(inner, _INVOKE, "</invoke>")
    )


def functions(opened: str, closed: str, *, is_stripped: bool) -> Reader:
    """``<function=NAME> <parameter=KEY>VALUE</parameter> ... </function>`` between two marks."""
    head = re.compile(rf"{re.escape(opened)}\s*<function=\s*([^\s<>]+)>?")
    start = re.compile(rf"{re.escape(opened)}\s*{beginning_of('<function=')}")
    tail = re.compile(rf"</function>\s*{re.escape(closed)}")

    def read(text: str, is_final: bool) -> Outcome:
        named = head.match(text)
        end = tail.search(text)
        if named and end:
            pairs = sections(text[named.end() : end.start()], _PARAMETER, "</parameter>")
            return Calls((FunctionCall(named[1], _arguments(pairs, is_stripped=is_stripped)),), end.end())
        if named:
            return Awaited((closed,))
        is_possible = start.fullmatch(text) or re.match(rf"{re.escape(opened)}\s*<function=", text)
        return None if is_possible else NoCall(len(opened))

    return Reader((opened,), read, (closed,))


_KEY = re.compile(r"\s*<arg_key>")
_VALUE = re.compile(r"</arg_key>\s*<arg_value>")
_XML_NAME = re.compile(r"\s*([^\s<>{}\[\]\"]+)\s*")


def _arg_pairs(inner: str) -> tuple[FunctionCall, ...]:
    """GLM-4.5's ``NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ...``, or Qwen's JSON."""
    if inner.lstrip().startswith("{"):
        return calls_of(inner)
    named = _XML_NAME.match(inner)
    if named is None:
        return ()
    pairs, at = [], named.end()
    while key := _KEY.match(inner, at):
        value = _VALUE.match(inner, key_end := inner.find("</arg_key>", key.end())) if "</arg_key>" in inner else None
        if value is None or (end := inner.find("</arg_value>", value.end())) < 0:
            break
        pairs.append((inner[key.end() : key_end], inner[value.end() : end]))
        at = end + len("</arg_value>")
    return () if inner[at:].strip() else (FunctionCall(named[1], _arguments(pairs)),)


_closed_pairs = block("<tool_call>", "</tool_call>", _arg_pairs, r"\{|[^\s<>{}\[\]\"]+\s*(?:<|$)")


def read_glm4_moe(text: str, is_final: bool) -> Outcome:
    """Calls may lack ``</tool_call>``: LLaMA-Factory writes none, so models trained with it don't either."""
    opened, closed = "<tool_call>", "</tool_call>"
    outcome = _closed_pairs.read(text, is_final)
    following = text.find(opened, len(opened))
    until = len(text) if outcome is None or isinstance(outcome, Awaited) else outcome.end
    if 0 < following < until and (calls := _arg_pairs(text[len(opened) : following])):
        return Calls(calls, following)
    if is_final and not isinstance(outcome, Calls | NoCall):
        inner = re.sub(rf"\s*{beginning_of(closed)}$", "", text[len(opened) :])
        if calls := _arg_pairs(inner):
            return Calls(calls, len(text))
    return Awaited((opened, closed)) if isinstance(outcome, Awaited) else outcome


_DEEPSEEK_HEAD = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^\s<｜]+)(?:<｜tool▁sep｜>|\s*```json\s*)"
)


def deepseek(inner: str) -> tuple[FunctionCall, ...]:
    try:
        found = [
            (name, strict_json(text.strip().removeprefix("```json").removesuffix("```")))
            for name, text in sections(inner, _DEEPSEEK_HEAD, "<｜tool▁call▁end｜>")
        ]
    except (ValueError, RecursionError):
        return ()
    return tuple(FunctionCall(name, as_json(value)) for name, value in found)


_HARMONY_HEAD = re.compile(r"<\|channel\|>commentary to=functions\.([\w.-]+).*?<\|message\|>", re.DOTALL)
_HARMONY_ENDS = ("<|call|>", "<|end|>", "<|return|>")
_HARMONY_END = re.compile("|".join(map(re.escape, _HARMONY_ENDS)))


def read_harmony(text: str, is_final: bool) -> Outcome:
    """gpt-oss: ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>JSON<|call|>``.

    ``<|call|>`` ends the answer, and as a stop token it has no text: the answer's end counts as well."""
    head = _HARMONY_HEAD.match(text)
    if head is None:
        return Awaited(("<|message|>",))
    end = _HARMONY_END.search(text, head.end())
    if end is None and not is_final:
        return Awaited(_HARMONY_ENDS)
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
