"""A model's text taken apart into thoughts, content and tool calls, while it streams or at once.

    parser = ToolParser({"tools": "qwen", "think": ["<think>", "</think>"]}, key=job_id)
    for piece in stream: deltas = parser.feed(piece)
    deltas = parser.close()

What has come out after any prefix of the text depends on that prefix alone, not on how it was cut: any reader of a job,
early or late, sees the same. No mark of a call or of thoughts, nor part of one, comes out as content, unless the answer
ends and it never became a call. ``parse`` is the same in one step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenfleet.wire.chat import FunctionCall, Message, ToolCall
from tokenfleet.wire.toolformats import READERS, Awaited, Begun, Calls, ForcedCalls, NoCall, Reader


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """As in OpenAI's streams: the first of a call has ``id`` and ``name``, the rest only more of ``arguments``."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


ParsedDelta = ContentDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class Parsed:
    """A whole answer. ``content`` is None if there is none beside calls; ``finish_reason`` is OpenAI's: ``tool_calls``
    where they are why it stopped."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str = ""

    @property
    def message(self) -> Message:
        """The answer as the next request's messages have it; one of role ``tool`` for each call is to follow."""
        return Message(
            role="assistant", content=self.content, reasoning_content=self.reasoning, tool_calls=self.tool_calls
        )


def call_id(key: str, index: int) -> str:
    """The same for every reader of a choice; ``key`` is best the job's id and the choice's number."""
    return "call_" + hashlib.blake2b(f"{key}:{index}".encode(), digest_size=12).hexdigest()


def choice_key(job_id: str, choice: int) -> str:
    """A `call_id`'s key."""
    return f"{job_id}:{choice}"


class ToolParser:
    """``parser`` is what `engines.prompts.render` says about an answer's form (`Started.parser`), all optional:

    ``tools``     a name in `wire.toolformats.READERS`; absent: text stays text
    ``think``     [opening mark, closing mark] of thoughts, that an answer may begin with
    ``open``      the prompt ended within thoughts already
    ``prefix``    what the prompt put into the model's mouth (a forced call's beginning); read before the text
    ``parallel``  False: what follows the first call is dropped
    ``forced``    a grammar leaves nothing but calls of this form (`ForcedCalls`): they come out while they are written
    """

    def __init__(self, parser: Mapping[str, Any], *, key: str = "") -> None:
        # An unknown name comes from a newer worker: its calls then stay text.
        self._readers: tuple[Reader, ...] = READERS.get(parser.get("tools") or "", ())
        self._is_whole = any(not reader.marks for reader in self._readers)
        self._think: tuple[str, str] | None = tuple(parser["think"]) if parser.get("think") else None
        self._is_single = parser.get("parallel") is False
        self._forced = ForcedCalls(parser["forced"], is_single=self._is_single) if parser.get("forced") else None
        self._key = key
        self._held = ""
        self.thought_chars = 0
        """Of the text so far, how much was thoughts and their marks."""
        self._mode = "think" if self._think and parser.get("open") else "start" if self._think else "text"
        self._is_blank = self._mode == "think"  # nothing but blanks since the thoughts or a call: they are dropped
        self._calls = 0
        self._awaited: tuple[str, ...] = ()  # words without which the call that was begun is neither one nor none
        self._looked_at = 0  # how much of what is held has been searched for them
        self._prefix: str = parser.get("prefix") or ""

    @property
    def has_calls(self) -> bool:
        return self._calls > 0

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to thoughts."""
        return self._mode == "think"

    @property
    def is_plain(self) -> bool:
        """Whether all that comes from here on is content as it stands, so that `feed` may be left out."""
        return self._mode == "text" and not (self._readers or self._is_blank or self._held or self._prefix)

    def feed(self, text: str) -> list[ParsedDelta]:
        self._held += self._prefix + text
        self._prefix = ""
        return list(self._run(is_final=False))

    def close(self) -> list[ParsedDelta]:
        """The text has ended."""
        self._held += self._prefix
        self._prefix = ""
        return list(self._run(is_final=True))

    def finish_reason(self, reason: str) -> str:
        is_cut = self._forced is not None and self._forced.is_cut  # by a stop string of the caller's
        return "tool_calls" if reason == "stop" and self._calls and not is_cut else reason

    def _run(self, *, is_final: bool) -> Iterator[ParsedDelta]:
        if self._mode == "start":
            self._start(is_final)
        if self._mode == "think":
            yield from self._thoughts(is_final)
        if self._mode == "text" and self._forced is not None:
            yield from self._forced_calls(self._forced, is_final)
        elif self._mode == "text":
            yield from self._text(is_final)

    def _start(self, is_final: bool) -> None:
        assert self._think is not None
        opened, text = self._think[0], self._held.lstrip()
        if text.startswith(opened):
            self.thought_chars += len(self._held) - len(text) + len(opened)
            self._mode, self._held, self._is_blank = "think", text[len(opened) :], True
        elif is_final or not opened.startswith(text):
            self._mode = "text"

    def _thoughts(self, is_final: bool) -> Iterator[ParsedDelta]:
        assert self._think is not None
        end, held = self._held.find(self._think[1]), len(self._held)
        is_over = end >= 0
        if is_over:
            thought, self._held = self._held[:end], self._held[end + len(self._think[1]) :]
        else:
            keep = 0 if is_final else _begun(self._held, (self._think[1],))
            thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if self._is_blank:
            thought = thought.lstrip()
        shown = thought.rstrip()
        if not is_over and not is_final:
            self._held = thought[len(shown) :] + self._held
        self.thought_chars += held - len(self._held)
        if shown:
            self._is_blank = False
            yield ReasoningDelta(shown)
        if is_over:
            self._mode, self._is_blank = "text", True

    def _text(self, is_final: bool) -> Iterator[ParsedDelta]:
        if self._awaited and not is_final and not self._is_awaited_there():
            return
        self._awaited = ()
        while True:
            if self._is_blank:
                self._held = self._held.lstrip()
            if self._is_single and self._calls:
                self._held = ""
            found = self._candidate()
            if found is None:
                break
            at, reader = found
            blanks = len(self._held[:at]) - len(self._held[:at].rstrip())
            if at > blanks:
                yield self._show(at - blanks)
                at = blanks
            outcome = reader.read(self._held[at:], is_final)
            if isinstance(outcome, Awaited) and not is_final:
                self._awaited, self._looked_at = outcome.words, len(self._held)
            if isinstance(outcome, Awaited | None) and not is_final:
                return
            if isinstance(outcome, Calls):
                self._held = self._held[at + outcome.end :]
                self._is_blank = True
                for call in outcome.calls[: 1 if self._is_single else None]:
                    yield ToolCallDelta(self._calls, call_id(self._key, self._calls), call.name)
                    yield ToolCallDelta(self._calls, arguments=call.arguments)
                    self._calls += 1
            elif isinstance(outcome, NoCall) and not reader.marks:
                self._readers, self._is_whole = (), False
            elif isinstance(outcome, NoCall):
                yield self._show(at + outcome.end)
            elif self._calls:  # a call was begun and not finished, after others that were
                self._held = ""
            else:
                yield self._show(len(self._held))
        keep = 0 if is_final else _begun(self._held, tuple(mark for reader in self._readers for mark in reader.marks))
        text = self._held[: len(self._held) - keep]
        if self._readers and not (is_final and not self._calls):
            text = text.rstrip()
        if text:
            yield self._show(len(text))
        if is_final:
            self._held = ""

    def _forced_calls(self, forced: ForcedCalls, is_final: bool) -> Iterator[ParsedDelta]:
        found, self._held = forced.feed(self._held)
        for piece in found:
            if isinstance(piece, Begun):
                yield ToolCallDelta(self._calls, call_id(self._key, self._calls), piece.name)
                self._calls += 1
            else:
                yield ToolCallDelta(self._calls - 1, arguments=piece)
        if forced.is_void or (is_final and not self._calls):
            self._forced = None
            yield from self._text(is_final)

    def _is_awaited_there(self) -> bool:
        looked_at, self._looked_at = self._looked_at, len(self._held)
        return any(self._held.find(word, max(0, looked_at - len(word) + 1)) >= 0 for word in self._awaited)

    def _candidate(self) -> tuple[int, Reader] | None:
        """Where a call may begin, and who can read it."""
        if self._is_whole and self._held and not self._calls:
            return 0, next(reader for reader in self._readers if not reader.marks)
        found = [
            (at, reader) for reader in self._readers for mark in reader.marks if (at := self._held.find(mark)) >= 0
        ]
        return min(found, key=lambda pair: pair[0]) if found else None

    def _show(self, length: int) -> ContentDelta:
        text, self._held = self._held[:length], self._held[length:]
        self._is_blank = False
        return ContentDelta(text)


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which one of ``marks`` begins."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def parse(text: str, parser: Mapping[str, Any], *, key: str = "", reason: str = "") -> Parsed:
    """The whole of ``text`` at once; ``reason`` is why the engine stopped."""
    machine = ToolParser(parser, key=key)
    found = assemble([*machine.feed(text), *machine.close()])
    return replace(found, finish_reason=machine.finish_reason(reason))


def assemble(deltas: list[ParsedDelta]) -> Parsed:
    """What a client has when it has put all deltas together."""
    content, reasoning = "", ""
    calls: list[tuple[str, str, str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case ToolCallDelta(index, made, name, arguments):
                if index == len(calls):
                    calls.append(("", "", ""))
                was = calls[index]
                calls[index] = (was[0] + (made or ""), was[1] + (name or ""), was[2] + arguments)
    found = tuple(
        ToolCall(id=made, function=FunctionCall(name=name, arguments=arguments)) for made, name, arguments in calls
    )
    return Parsed(content if content or not found else None, reasoning or None, found)
