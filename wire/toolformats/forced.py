"""Calls that a grammar holds to their form, so that their arguments can be shown while they are written.

Elsewhere a call comes out when it is complete, since it may still turn out to be none. These can't: the worker began
the first one itself, and the grammar leaves nothing but offered names and JSON objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


@dataclass(frozen=True, slots=True)
class Begun:
    """A call of that tool has begun."""

    name: str


class ForcedCalls:
    """``told`` is ``{"names": [...], "first": [before, after], "more": [before, after] or None}``: what stands around a
    name, from the call's beginning to its arguments, in the first call and in each further one."""

    def __init__(self, told: Mapping[str, Any], *, is_single: bool) -> None:
        names, more = told["names"], None if is_single else told["more"]
        self._heads = {told["first"][0] + name + told["first"][1]: name for name in names}
        self._more = {more[0] + name + more[1]: name for name in names} if more else {}
        self._arguments: _Object | None = None
        self._has_begun = False
        self._is_over = False
        self.is_void = False
        """This is no call after all (no grammar was there to hold it): the text is for the format's ordinary reader."""

    @property
    def is_cut(self) -> bool:
        """The last call's arguments have not ended."""
        return self._arguments is not None

    def feed(self, text: str) -> tuple[list[Begun | str], str]:
        """What has come: calls that begin and pieces of the last one's arguments. And the text that is to be given
        again, with what follows it."""
        found: list[Begun | str] = []
        while text and not (self._is_over or self.is_void):
            if self._arguments is not None:
                end = self._arguments.take(text)
                found.append(text[:end])
                text = text[end:]
                if self._arguments.is_done:
                    self._arguments, self._heads = None, self._more
                continue
            begun = next((head for head in self._heads if text.startswith(head + "{")), None)
            if begun is not None:
                found.append(Begun(self._heads[begun]))
                text, self._arguments, self._has_begun = text[len(begun) :], _Object(), True
            elif any(head.startswith(text) for head in self._heads):
                break
            else:
                self._is_over, self.is_void = self._has_begun, not self._has_begun
        return found, "" if self._is_over else text


class _Object:
    """Finds where a JSON object ends, in time linear in its text."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self.is_done = False

    def take(self, text: str) -> int:
        """How much of ``text`` belongs to it."""
        at = int(self._is_escaped)
        self._is_escaped = False
        while at < len(text):
            sign = (_INSIDE if self._is_in_string else _OUTSIDE).search(text, at)
            if sign is None:
                break
            at = sign.end()
            match sign[0]:
                case '"':
                    self._is_in_string = not self._is_in_string
                case "\\":
                    self._is_escaped = at == len(text)
                    at += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if not self._depth:
                        self.is_done = True
                        return at
        return len(text)
