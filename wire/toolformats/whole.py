"""Calls without marks: the answer, or all of its end, is nothing else (Llama 3, Mistral, GLM-4, "default")."""

from __future__ import annotations

import json
import re

from tokenfleet.wire.toolformats.base import (
    Calls,
    FunctionCall,
    NoCall,
    Outcome,
    Reader,
    as_json,
    beginning_of,
    calls_of,
)


def whole(arguments: str, mark: str) -> Reader:
    """An answer that is nothing but JSON of a call or a list of them, perhaps after ``mark``."""

    def read(text: str, is_final: bool) -> Outcome:
        body = text.lstrip()
        is_possible = mark.startswith(body) or body.startswith((mark, "{", "["))
        if not is_final or not is_possible:
            return None if is_possible else NoCall(0)
        calls = calls_of(body.removeprefix(mark).strip(), arguments)
        return Calls(calls, len(text)) if calls else NoCall(0)

    return Reader((), read, (mark,))


_GLM_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_GLM_START = re.compile(r"[A-Za-z0-9_.:/-]{0,128}(?:\n\s*(?:\{.*)?)?", re.DOTALL)
_decoder = json.JSONDecoder()


def read_glm4(text: str, is_final: bool) -> Outcome:
    """``NAME``, a line break, the arguments as a JSON object; several calls follow one another. Nothing else."""
    if not _GLM_START.fullmatch(text):
        return NoCall(0)
    if not is_final:
        return None
    calls, at = [], 0
    while named := _GLM_NAME.match(text, at):
        brace = re.compile(r"\n\s*(?=\{)").match(text, named.end())
        if brace is None:
            return NoCall(0)
        try:
            value, at = _decoder.raw_decode(text, brace.end())
            calls.append(FunctionCall(named[0], as_json(value)))
        except (ValueError, RecursionError):
            return NoCall(0)
        at = len(text) - len(text[at:].lstrip())
    return Calls(tuple(calls), len(text)) if calls and at == len(text) else NoCall(0)


_ACTION = re.compile(r"Action:\s*([a-zA-Z0-9_]+)\s*Action Input:")
_ACTION_START = re.compile(rf"Action:\s*(?:[a-zA-Z0-9_]+\s*{beginning_of('Action Input:')})?")
_QUOTES = re.compile(r'[\s"`]*')


def read_default(text: str, is_final: bool) -> Outcome:
    """``Action: NAME``, ``Action Input: JSON``, to the end of the answer: with text after it, or bad JSON, none counts.

    What only begins like a further call ends the list."""
    if not _ACTION.match(text):
        return None if not is_final and _ACTION_START.fullmatch(text) else NoCall(len("Action:"))
    if not is_final:
        return None
    calls, at = [], 0
    while named := _ACTION.match(text, at):
        try:
            value, at = _decoder.raw_decode(text, _after_quotes(text, named.end()))
            calls.append(FunctionCall(named[1], as_json(value)))
        except (ValueError, RecursionError):
            return NoCall(len(text))
        at = _after_quotes(text, at)
    return Calls(tuple(calls), at) if at == len(text) or text.startswith("Action:", at) else NoCall(len(text))


def _after_quotes(text: str, at: int) -> int:
    found = _QUOTES.match(text, at)
    return found.end() if found else at
