"""The gateway's short cut for plain text makes the very bytes that the long way makes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenfleet.producer.gateway.answers import ReasoningCount
from tokenfleet.producer.gateway.chunks import ChatChunks, StreamOptions, TextChunks
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, Finished, Queued, Started, Usage

PARSERS: list[dict[str, Any]] = [
    {},
    {"think": ["<think>", "</think>"]},
    {"think": ["<think>", "</think>"], "open": True},
    {"tools": "qwen"},
    {"prefix": "So: "},
]


class LongChat(ChatChunks):
    def only_text_comes(self, choice: int, chunk: dict[str, Any]) -> None:
        pass


class LongText(TextChunks):
    def only_text_comes(self, choice: int, chunk: dict[str, Any]) -> None:
        pass


def frames(chunks: ChatChunks | TextChunks, log: list[AnyEvent]) -> list[bytes]:
    return [chunks.frame(seq, event) for seq, event in enumerate(log, 1)]


def log_of(parser: dict[str, Any], pieces: list[tuple[int, str]]) -> list[AnyEvent]:
    log: list[AnyEvent] = [Queued(t_ms=1_700_000_000_000, model="m"), Started(1, "w", 7, parser)]
    at = {0: 0, 1: 0}
    for choice, text in pieces:
        log.append(Delta(choice, at[choice], (5,), text))
        at[choice] += 1
    return [*log, *(ChoiceFinished(c, "stop", at[c]) for c in at), Finished(Usage(7, len(pieces)))]


# A busy machine is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The marks of thoughts and calls, whole and in parts, among all else.
TEXTS = st.one_of(st.sampled_from(["<think>", "</think>", "</th", "ink>", "<tool_call>", "\n", " ", "text"]), st.text())


@pytest.mark.parametrize("parser", PARSERS, ids=str)
@PATIENT
@given(pieces=st.lists(st.tuples(st.integers(0, 1), TEXTS), max_size=12), after=st.integers(0, 8), usage=st.booleans())
def test_chats(parser: dict[str, Any], pieces: list[tuple[int, str]], after: int, usage: bool) -> None:
    log, options = log_of(parser, pieces), StreamOptions(usage=usage)
    quick = frames(ChatChunks("job", 'a "model"', options, after), log)
    assert quick == frames(LongChat("job", 'a "model"', options, after), log)


@PATIENT
@given(pieces=st.lists(st.tuples(st.integers(0, 1), TEXTS.filter(bool)), max_size=12), after=st.integers(0, 8))
def test_completions(pieces: list[tuple[int, str]], after: int) -> None:
    log, options = log_of({}, pieces), StreamOptions(usage=True)
    quick = frames(TextChunks("job", "model", options, after, offset=3), log)
    assert quick == frames(LongText("job", "model", options, after, offset=3), log)


def test_a_plain_chat_does_take_the_short_cut() -> None:
    chunks = ChatChunks("job", "model", StreamOptions())
    frames(chunks, log_of({}, [(0, "one"), (0, " two")])[:-3])
    assert chunks._around.keys() == {0}


@PATIENT
@given(text=st.text("ab <>\n", max_size=20), answer=st.text("ab ", max_size=9), cuts=st.sets(st.integers(1, 40)))
def test_thoughts_are_counted_however_their_tokens_come_together(text: str, answer: str, cuts: set[int]) -> None:
    """Here each character is a token."""
    thoughts = f"<think>{text}</think>"
    whole, count = thoughts + answer, ReasoningCount()
    count.add(Started(1, "w", 7, {"think": ["<think>", "</think>"]}))
    places = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    for start, end in itertools.pairwise(places):
        count.add(Delta(0, start, (5,) * (end - start), whole[start:end]))
    assert count.tokens == len(thoughts)
