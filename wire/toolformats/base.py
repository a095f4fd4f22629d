"""What a reader of tool calls is, and the JSON that all of them share."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class FunctionCall(NamedTuple):
    """``arguments`` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Calls:
    """The text up to ``end`` is these calls."""

    calls: tuple[FunctionCall, ...]
    end: int


@dataclass(frozen=True, slots=True)
class NoCall:
    """The text up to ``end`` is ordinary text (0: all of it is, however it goes on)."""

    end: int


@dataclass(frozen=True, slots=True)
class Awaited:
    """As None, until one of these ``words`` is complete (or the text ends): no need to look again before."""

    words: tuple[str, ...]


Outcome = Calls | NoCall | Awaited | None
"""None: more text is needed, or, at its end, a call was begun and not finished."""


@dataclass(frozen=True, slots=True)
class Reader:
    """``read(text, is_final)`` gets the text from a mark on. No marks: it gets the whole answer, from its start."""

    marks: tuple[str, ...]
    read: Callable[[str, bool], Outcome]
    words: tuple[str, ...] = ()
    """Further words of the format that may be special tokens and must not be dropped when ids become text."""


def as_json(value: Any) -> str:
    """JSON text that can be encoded: a lone surrogate, which JSON may hold and UTF-8 may not, stays escaped.

    Raises ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def strict_json(text: str) -> Any:
    """`json.loads` without NaN and infinities, which are no JSON. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, allow_nan=False)  # 1e999 reads as infinity
    return value


def _call(value: Any, arguments: str = "arguments") -> FunctionCall | None:
    """The call in ``{"name": ..., "arguments": ...}``. Arguments that are JSON text already stay one object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or arguments not in value:
        return None
    given = value[arguments]
    if isinstance(given, str):
        with contextlib.suppress(ValueError, RecursionError):
            given = inner if isinstance(inner := strict_json(given), dict) else given
    return FunctionCall(value["name"], as_json(given))


def calls_of(text: str, arguments: str = "arguments") -> tuple[FunctionCall, ...]:
    """Calls out of JSON of one or of a list; () if it is anything else."""
    try:
        value = strict_json(text)
    except (ValueError, RecursionError):
        return ()
    calls = [_call(item, arguments) for item in (value if isinstance(value, list) else [value])]
    return tuple(call for call in calls if call) if all(calls) else ()


def value_of(text: str) -> Any:
    """A parameter's value: JSON if it is some, else the text itself."""
    try:
        return strict_json(text.strip())
    except (ValueError, RecursionError):
        return text


def sections(text: str, head: re.Pattern[str], closed: str) -> list[tuple[str, str]]:
    """(first group of ``head``, text from there to ``closed``) one after the other, in time linear in ``text``: a
    pattern with two lazy groups takes hours for what a model can be talked into writing."""
    found, at = [], 0
    while (opened := head.search(text, at)) and (end := text.find(closed, opened.end())) >= 0:
        found.append((opened[1], text[opened.end() : end]))
        at = end + len(closed)
    return found


def is_in_string(text: str) -> bool:
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', text)) % 2 == 1


def beginning_of(word: str) -> str:
    """A pattern for every beginning of ``word``, the empty one included."""
    return "".join(f"(?:{re.escape(char)}" for char in word) + ")?" * len(word)
