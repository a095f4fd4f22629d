"""What a prompt may ask of the scripted engine. The last of each kind in the prompt counts.

[[say: "text"]]               exactly this text (a JSON string), then EOS, whatever the other parameters say but
                              stop strings and token limits
[[spell: "text"]]             the same, one byte a token: every character but ASCII's is split over tokens
[[eos: K]]                    EOS is token K (from 0), as the option ``eos_after``
[[fault: KIND at K]]          before token K is made; only with ``allow_faults``; KIND is one of
    raise                     `EngineError`: this sequence alone fails
    oom                       `EngineError` with code ``out_of_memory``
    dead                      `EngineDead`, for this sequence and from now on for all
    doom S                    the same S seconds later, whether or not anything runs then; the token is made
    hang                      this sequence never makes another token
    freeze                    no sequence does: the step counter stands still, the loop is alive
    block S                   the event loop stands still for S seconds
    die                       the process kills itself (SIGKILL)
    exit                      the process ends at once (``os._exit(1)``)
[[fault: KIND at K on attempt N]]     only in the job's N-th attempt
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, cast

from tokenfleet.engines.scripted.tokenizer import ScriptedTokenizer

FaultKind = Literal["raise", "oom", "dead", "doom", "hang", "freeze", "block", "die", "exit"]

_STRING = r'"(?:[^"\\]|\\.)*"'
_SAY = re.compile(rf"\[\[(say|spell):\s*({_STRING})\s*\]\]", re.DOTALL)
_EOS = re.compile(r"\[\[eos:\s*(\d{1,9})\s*\]\]")
_FAULT = re.compile(
    r"\[\[fault:\s*(raise|oom|dead|doom|hang|freeze|block|die|exit)(?:\s+(\d{1,6}(?:\.\d{1,6})?))?\s+at\s+(\d{1,9})"
    r"(?:\s+on\s+attempt\s+(\d{1,9}))?\s*\]\]"
)


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    at: int
    """Index of the token that is not made any more (or late)."""
    seconds: float = 0.0
    """Of ``block`` and ``doom``."""
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Directives:
    say: tuple[int, ...] | None = None
    eos_at: int | None = None
    fault: Fault | None = None


def read_directives(prompt_ids: tuple[int, ...], tokenizer: ScriptedTokenizer) -> Directives:
    """Malformed ones are text like any other."""
    if prompt_ids.count(91) < 2:  # "[": no directive without one, and most prompts have none
        return _NONE
    text = tokenizer.decode(prompt_ids)
    say: tuple[int, ...] | None = None
    for how, string in _SAY.findall(text):
        try:
            words = cast(str, json.loads(string, strict=False))
        except ValueError:
            continue
        data = words.encode("utf-8", "replace")
        say = tuple(data) if how == "spell" else tuple(tokenizer.encode(words))
    eos = _EOS.findall(text)
    faults = _FAULT.findall(text)
    fault = None
    if faults:
        kind, seconds, at, attempt = faults[-1]
        fault = Fault(kind, int(at), float(seconds or 0), int(attempt) if attempt else None)
    return Directives(say, int(eos[-1]) if eos else None, fault)


_NONE = Directives()
