"""What ends a choice: the ids that do, and stop strings, found as the text grows whatever tokens it comes in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenfleet.wire.chat import GenerationParams


def ending_ids(params: GenerationParams, eos_ids: Iterable[int]) -> frozenset[int]:
    """Ids after which an engine ends a choice with ``stop``: ``ignore_eos`` spares EOS, never ``stop_token_ids``."""
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_ids)


@dataclass(frozen=True, slots=True)
class StopMatch:
    stop: str
    end: int
    """Where the stop string ends, in characters from the start of the text pushed last."""


class _Pattern:
    """Knuth-Morris-Pratt over one stop string: linear in the text, however nasty the string."""

    __slots__ = ("fallback", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # how many characters of the stop the text ends with
        self.fallback = [0] * len(stop)
        k = 0
        for i in range(1, len(stop)):
            while k and stop[k] != stop[i]:
                k = self.fallback[k - 1]
            k += stop[k] == stop[i]
            self.fallback[i] = k

    def advance(self, text: str, armed: bool) -> int | None:
        """Where the first match ends in ``text``. When not ``armed``, matches are passed over."""
        stop, fallback, k = self.stop, self.fallback, self.matched
        position, length = 0, len(text)
        while position < length:
            if not k:
                position = text.find(stop[0], position)
                if position < 0:
                    break
            char = text[position]
            while k and stop[k] != char:
                k = fallback[k - 1]
            k += stop[k] == char
            position += 1
            if k == len(stop):
                if armed:
                    return position
                k = fallback[k - 1]
        self.matched = k
        return None


class StopMatcher:
    """Finds the stop string that is complete first; of two that end together, the longer one."""

    __slots__ = ("_beginning", "_patterns", "open_chars")

    def __init__(self, stops: Iterable[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in dict.fromkeys(stops)]
        firsts = {re.escape(pattern.stop[0]) for pattern in self._patterns}
        self._beginning = re.compile("|".join(firsts)) if firsts else None
        self.open_chars = 0
        """How many of the last characters may be the beginning of a stop string."""

    def push(self, text: str, *, armed: bool = True) -> StopMatch | None:
        """Read on. After a match the matcher is spent. Unless ``armed``, matches that end in ``text`` don't count."""
        if self._beginning is None or (not self.open_chars and self._beginning.search(text) is None):
            return None
        found: StopMatch | None = None
        for pattern in self._patterns:
            end = pattern.advance(text if found is None else text[: found.end], armed)
            if end is None:
                continue
            if found is None or (end, -len(pattern.stop)) < (found.end, -len(found.stop)):
                found = StopMatch(pattern.stop, end)
        self.open_chars = max(pattern.matched for pattern in self._patterns)
        return found
