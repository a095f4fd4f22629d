"""A complete response, assembled from a job's events by whoever reads them."""

from __future__ import annotations

from typing import Any

import msgspec

from tokenfleet.wire.events import ChoiceFinished, Delta, TokenLogprob, Usage
from tokenfleet.wire.toolcalls import Parsed, choice_key, parse


class Choice(msgspec.Struct, frozen=True, omit_defaults=True):
    """One of n answers. ``finish_reason`` is "" while it is incomplete; ``ids`` include EOS and stop tokens."""

    index: int
    text: str
    finish_reason: str = ""
    stop: str | None = None
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Timing(msgspec.Struct, frozen=True):
    """Of a whole job, by Redis' clock, in seconds; None where it never came to that."""

    queue_wait_s: float | None
    """Submit to first claim."""
    ttft_s: float | None
    """Submit to first token."""
    total_s: float | None
    tokens_per_s: float | None
    """Over the time from the first token to the end."""


class ChatResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """All choices of a finished job (or the scores of a scoring job)."""

    job_id: str
    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    scores: tuple[float, ...] | None = None
    parser: dict[str, Any] = {}

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""

    def parsed(self, choice: int = 0) -> Parsed:
        """One choice taken apart into content, thoughts and tool calls, as its model's family writes them. Ids of
        calls are the same for every reader, gateways included."""
        found = next(each for each in self.choices if each.index == choice)
        return parse(found.text, self.parser, key=choice_key(self.job_id, choice), reason=found.finish_reason)


class ChoiceBuilder:
    """Grows a `Choice` from its deltas."""

    __slots__ = ("finish_reason", "ids", "index", "logprobs", "stop", "texts")

    def __init__(self, index: int) -> None:
        self.index = index
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = ""
        self.stop: str | None = None

    def add(self, delta: Delta) -> None:
        self.ids += delta.ids
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs

    def finish(self, event: ChoiceFinished) -> None:
        self.finish_reason, self.stop = event.reason, event.stop

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def build(self, *, with_ids: bool = True) -> Choice:
        ids, logprobs = (tuple(self.ids), tuple(self.logprobs)) if with_ids else ((), ())
        return Choice(self.index, self.text, self.finish_reason, self.stop, ids, logprobs)
