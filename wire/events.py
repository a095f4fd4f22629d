"""The events of a job: one JSON object each, ``type`` first. The token log holds them, the channel repeats them.

A job's log is `queued`, then per attempt a `started`, then `delta` and `choice_finished` in any order of choices,
and last exactly one of `finished`, `failed`, `cancelled`, `expired`. docs/wire.md has the same as tables.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenfleet.wire.errors import ErrorBody


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    id: int
    token: str
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token's natural-log probability and the most probable alternatives, best first.

    Of the model's own distribution, before temperature, penalties and cuts: what OpenAI's API, vLLM
    (``logprobs_mode=raw_logprobs``) and SGLang report."""

    id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts over all choices. ``attempts`` is how many workers worked at the job."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Event(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Base of all events."""


class Queued(Event, tag="queued", frozen=True):
    """Written by submit; ``t_ms`` is Redis' clock in milliseconds since 1970, here and below."""

    t_ms: int = 0
    model: str = ""


class Started(Event, tag="started", frozen=True):
    """An attempt begins (or goes on where the last one stopped, when ``epoch`` > 1).

    ``parser`` says how to read tool calls and thoughts out of the text: ``{"tools": NAME, "think": [OPEN, CLOSE]}``."""

    epoch: int
    worker: str = ""
    prompt_tokens: int = 0
    parser: dict[str, Any] = {}


class Delta(Event, tag="delta", frozen=True):
    """New tokens of one choice. ``index`` is the position of the first of ``ids`` among the choice's tokens, from 0.

    Cut only where the text of all its tokens is final. ``text`` is "" for EOS and matched stop tokens."""

    choice: int
    index: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ChoiceFinished(Event, tag="choice_finished", frozen=True):
    """One of n choices is complete: ``tokens`` ids were delivered. ``stop`` is the matched stop string, if any."""

    choice: int
    reason: str
    tokens: int
    stop: str | None = None


class Finished(Event, tag="finished", frozen=True):
    """Terminal: all is there. ``scores`` is set for scoring jobs only."""

    usage: Usage
    scores: tuple[float, ...] | None = None


class Failed(Event, tag="failed", frozen=True):
    """Terminal: the job failed; what was delivered before stays readable."""

    error: ErrorBody
    usage: Usage = Usage()


class Cancelled(Event, tag="cancelled", frozen=True):
    """Terminal: somebody cancelled it."""

    usage: Usage = Usage()
    reason: str = ""


class Expired(Event, tag="expired", frozen=True):
    """Terminal: its queue time-to-live or its total deadline passed (``error.code``)."""

    error: ErrorBody
    usage: Usage = Usage()


AnyEvent = Queued | Started | Delta | ChoiceFinished | Finished | Failed | Cancelled | Expired
TERMINAL = (Finished, Failed, Cancelled, Expired)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    return _encoder.encode(event)


def decode(data: bytes | str) -> AnyEvent:
    """Raises `msgspec.ValidationError` for anything that is no event of this or an older release."""
    return _decoder.decode(data)
