"""What a template may make at most: text, lists, numbers. `sandbox` asks here before and after whatever makes one.

Python's own operations can't be stopped on their way, so that what they would come to is worked out first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.utils import Namespace

MAX_CHARS = 16_000_000
MAX_ITEMS = 1_000_000
"""Of one list. A request has at most 4 MB."""
_MAX_BITS = 100_000  # far above any honest arithmetic of a template, far below what stalls the interpreter
_MAX_WIDTH = 100_000
_SLOW_CHARS = 100_000
_SLOW = frozenset({"pprint", "urlize", "wordwrap", "xmlattr"})
"""Filters that take a second for a million characters, or a minute."""
_WIDE = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"})
"""Filters whose numbers are widths or counts."""
_PERCENT_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")
_BRACE_WIDTH = re.compile(r":[^{}]*(\d{5}|\{)")


class LimitExceeded(Exception):
    """A template ran too long or made too much text."""


class SilentNamespace(Namespace):
    """Jinja's own shows all that it holds, and what that holds, however often the same thing is in it."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Weights:
    """How much text a value comes to when it is written out: characters, and one for each item, as often as it is in
    there. Lists of the sandbox can't be changed, so each is looked through once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}  # by id, with the value, so that no other one gets its id

    def of(self, value: Any) -> int:
        if isinstance(value, str | bytes):
            return len(value) + 1
        if not isinstance(value, list | tuple | dict):
            return 1
        known = self._known.get(id(value))
        if known is None:
            items = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            known = self._known[id(value)] = (1 + sum(map(self.of, items)), value)
        return known[0]

    def note_sum(self, left: Any, right: Any, both: Any) -> None:
        """``both`` is ``left + right``. Lists that grow item by item would be looked through again each time."""
        if isinstance(both, list | tuple):
            self._known[id(both)] = (self.of(left) + self.of(right), both)


def bounded(value: Any, weights: Weights) -> Any:
    """Raises `LimitExceeded`."""
    if isinstance(value, str) and len(value) > MAX_CHARS:
        raise LimitExceeded(f"the chat template made more than {MAX_CHARS} characters")
    if isinstance(value, list | tuple | dict) and (len(value) > MAX_ITEMS or weights.of(value) > MAX_CHARS):
        raise LimitExceeded(f"the chat template made a list of more than {MAX_CHARS} characters or {MAX_ITEMS} items")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise LimitExceeded("the chat template computes with numbers that are too large")
    return value


def refuse(is_too_much: bool) -> None:
    if is_too_much:
        raise LimitExceeded("the chat template asks for an absurd amount of text or digits")


def check_operator(operator: str, left: Any, right: Any, weights: Weights) -> None:
    match operator, left, right:
        case ("*", (str() | bytes() | list() | tuple()) as some, int(times)) | (
            "*",
            int(times),
            (str() | list() | tuple()) as some,
        ):
            refuse(weights.of(some) * times > MAX_CHARS)
        case "**", int(), int():
            refuse(left.bit_length() * abs(right) > _MAX_BITS)
        case "%", str(), _:
            _check_percents(left, right, weights)
        case _:
            pass


def _check_percents(form: str, values: Any, weights: Weights) -> None:
    refuse(_PERCENT_WIDTH.search(form) is not None or form.count("%") * weights.of(values) > MAX_CHARS)


def check_method(owner: Any, name: str, args: tuple[Any, ...], weights: Weights) -> None:
    """Before a value's method ``name`` is called."""
    if isinstance(owner, str):
        _check_text_method(owner, name, args, weights)
    elif isinstance(owner, bytes):
        refuse(name not in ("decode", "hex"))  # no honest template does more with bytes
    elif isinstance(owner, int):
        refuse(any(isinstance(arg, int) and arg > _MAX_WIDTH for arg in args))  # to_bytes


def _check_text_method(text: str, name: str, args: tuple[Any, ...], weights: Weights) -> None:
    numbers = [arg for arg in args if isinstance(arg, int)]
    first = args[0] if args else None
    match name:
        case "center" | "ljust" | "rjust" | "zfill":
            refuse(max(numbers, default=0) > _MAX_WIDTH)
        case "expandtabs":
            refuse(text.count("\t") * max(numbers, default=8) > MAX_CHARS)
        case "replace" if len(args) > 1 and isinstance(first, str) and isinstance(args[1], str):
            refuse(text.count(first) * len(args[1]) > MAX_CHARS)
        case "join":
            refuse(isinstance(first, list | tuple | str) and len(first) * len(text) + weights.of(first) > 2 * MAX_CHARS)
        case "split" | "rsplit" | "splitlines":
            refuse((text.count(first) if isinstance(first, str) and first else len(text) // 2) > MAX_ITEMS)
        case "translate":
            refuse(len(text) * weights.of(first) > MAX_CHARS)
        case _:
            pass


def check_format(form: str, args: tuple[Any, ...], named: Mapping[str, Any], weights: Weights) -> None:
    """Of ``form.format(*args, **named)``."""
    values = sum(map(weights.of, args)) + sum(map(weights.of, named.values()))
    refuse(_BRACE_WIDTH.search(form) is not None or form.count("{") * values > MAX_CHARS)


def limited(name: str, wanted: Callable[..., Any], weights_now: Callable[[], Weights]) -> Callable[..., Any]:
    """The filter ``name``, checked before and after."""
    skipped = 1 if hasattr(wanted, "jinja_pass_arg") else 0  # an environment or a context comes first

    @functools.wraps(wanted)
    def checked(*args: Any, **named: Any) -> Any:
        weights, (value, *others) = weights_now(), args[skipped:]
        if name == "join" and not isinstance(value, str):
            value = list(value)  # a generator's length is not known before
            args = (*args[:skipped], value, *others)
        _check_filter(name, value, [*others, *named.values()], weights)
        return bounded(wanted(*args, **named), weights)

    return checked


def _check_filter(name: str, value: Any, others: list[Any], weights: Weights) -> None:
    if name in _WIDE:
        widest = max((abs(each) for each in others if isinstance(each, int)), default=0)
        refuse(widest > _MAX_WIDTH or (name in ("indent", "tojson") and weights.of(value) * widest > MAX_CHARS))
    if name in _SLOW:
        refuse(weights.of(value) > _SLOW_CHARS)
    if name == "format":
        _check_percents(str(value), tuple(others), weights)
    if name in ("join", "replace"):
        texts = tuple(each for each in others if isinstance(each, str))
        text, args = (value, texts) if name == "replace" else (texts[0] if texts else "", (value,))
        _check_text_method(str(text), name, args, weights)
