"""A job's events as OpenAI's stream chunks: pure functions of the log's prefix, at most one chunk an event.

So ``id:`` = the event's seq names a chunk, and whoever resumes after it gets neither a gap nor a repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenfleet.producer.gateway.answers import ReasoningCount, created_s, logprobs_object, text_logprobs, usage_object
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, Finished, Started, Usage
from tokenfleet.wire.toolcalls import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta, ToolParser, choice_key

_encode = msgspec.json.Encoder().encode
_TEXT = "\0text\0"
_OPTIONS = frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"})


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """``continuous`` is vLLM's ``continuous_usage_stats``: usage so far with every chunk."""

    usage: bool = False
    continuous: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> StreamOptions | None:
        """None if the answer is wanted whole. Raises `InvalidRequest`."""
        stream, options = body.get("stream"), body.get("stream_options")
        if not isinstance(stream, bool | None):
            raise InvalidRequest("stream: true or false is needed.", param="stream")
        if options is None:
            return cls() if stream else None
        if not stream:
            raise InvalidRequest("stream_options are for stream: true.", param="stream_options")
        if not isinstance(options, Mapping) or not all(isinstance(value, bool | None) for value in options.values()):
            raise InvalidRequest("stream_options: an object of true and false is needed.", param="stream_options")
        if unknown := sorted(options.keys() - _OPTIONS):
            raise InvalidRequest(
                f"stream_options: unknown field {unknown[0]!r}.", code="unknown_field", param="stream_options"
            )
        return cls(bool(options.get("include_usage")), bool(options.get("continuous_usage_stats")))


@dataclass
class _Chunks:
    """What chats and completions share. ``after``: chunks up to that seq are counted and not sent."""

    job_id: str
    model: str
    options: StreamOptions
    after: int = 0
    created: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: ReasoningCount = field(default_factory=ReasoningCount)
    _around: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """By choice: what stands before and after the text of a chunk that is plain text."""

    def frame(self, seq: int, event: AnyEvent) -> bytes:
        """The server-sent event for an event of the log; b"" if it has none. To be called for each, in order."""
        if type(event) is Delta and not event.logprobs and (around := self._around.get(event.choice)) is not None:
            self.completion_tokens += len(event.ids)
            if seq <= self.after or not event.text:
                return b""
            return b"id: %d\ndata: %b%b%b\n\n" % (seq, around[0], _encode(event.text), around[1])
        chunk = self.chunk(event)
        return b"id: %d\ndata: %b\n\n" % (seq, _encode(chunk)) if chunk is not None and seq > self.after else b""

    def only_text_comes(self, choice: int, chunk: dict[str, Any]) -> None:
        """From here on all chunks of ``choice`` are ``chunk``, but for their text, which is `_TEXT` in it."""
        if not self.options.continuous:
            before, _, after = _encode(chunk).rpartition(_encode(_TEXT))
            self._around[choice] = before, after

    def chunk(self, event: AnyEvent) -> dict[str, Any] | None:
        if isinstance(event, Delta):
            self.completion_tokens += len(event.ids)
            return self.on_delta(event)
        if isinstance(event, ChoiceFinished):
            return self.on_choice_end(event)
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
            self.reasoning.add(event)
            self.on_start(event)
        elif isinstance(event, Finished):
            return self.on_usage(event.usage) if self.options.usage else None
        else:
            self.created = created_s(event) or self.created
        return None

    def on_start(self, event: Started) -> None:
        pass

    def on_delta(self, event: Delta) -> dict[str, Any] | None:
        raise NotImplementedError

    def on_choice_end(self, event: ChoiceFinished) -> dict[str, Any] | None:
        raise NotImplementedError

    def on_usage(self, usage: Usage) -> dict[str, Any]:
        return self.object([]) | {"usage": usage_object(usage, self._reasoning_tokens)}

    @property
    def _reasoning_tokens(self) -> int | None:
        return self.reasoning.tokens if self.reasoning.has_thoughts else None

    def object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.head(), "choices": choices}
        if self.options.continuous:
            chunk["usage"] = usage_object(Usage(self.prompt_tokens, self.completion_tokens), self._reasoning_tokens)
        return chunk

    def head(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class ChatChunks(_Chunks):
    """``chat.completion.chunk`` objects."""

    _parsers: dict[int, ToolParser] = field(default_factory=dict)
    _parser: dict[str, Any] = field(default_factory=dict)

    def on_start(self, event: Started) -> None:
        self._parser = event.parser

    def on_delta(self, event: Delta) -> dict[str, Any] | None:
        choice, delta = event.choice, {}
        parser = self._parsers.get(choice)
        if parser is None:
            parser = self._parsers[choice] = self._new_parser(choice)
            delta = {"role": "assistant", "content": ""}
        _merge(delta, parser.feed(event.text))
        self.reasoning.count(event, parser.thought_chars, is_thinking=parser.is_thinking)
        if parser.is_plain and choice not in self._around:
            self.only_text_comes(choice, self._chunk(choice, {"content": _TEXT}, None))
        logprobs = logprobs_object(event.logprobs) if event.logprobs else None
        return self._chunk(choice, delta, logprobs) if delta or logprobs else None

    def on_choice_end(self, event: ChoiceFinished) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        parser = self._parsers.get(event.choice)
        if parser is None:  # it ended without a token
            parser, delta = self._new_parser(event.choice), {"role": "assistant", "content": ""}
        _merge(delta, parser.close())
        return self._chunk(event.choice, delta, None, parser.finish_reason(event.reason))

    def _new_parser(self, choice: int) -> ToolParser:
        return ToolParser(self._parser, key=choice_key(self.job_id, choice))

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return self.object([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def head(self) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.job_id}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
        }


def _merge(delta: dict[str, Any], parsed: list[ParsedDelta]) -> None:
    """All that came out of one event's text, as one chunk's delta: its fields have no order among them."""
    for part in parsed:
        match part:
            case ContentDelta(text=text):
                delta["content"] = delta.get("content", "") + text
            case ReasoningDelta(text=text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments):
                calls = delta.setdefault("tool_calls", [])
                if calls and calls[-1]["index"] == index:
                    calls[-1]["function"]["arguments"] += arguments
                    continue
                function: dict[str, Any] = {"arguments": arguments}
                call: dict[str, Any] = {"index": index, "function": function}
                if call_id is not None:
                    call |= {"id": call_id, "type": "function"}
                    function["name"] = name
                calls.append(call)


@dataclass
class TextChunks(_Chunks):
    """``text_completion`` chunks; ``offset`` is the first choice's number among several prompts'."""

    offset: int = 0
    _length: dict[int, int] = field(default_factory=dict)

    def on_delta(self, event: Delta) -> dict[str, Any]:
        before = self._length.get(event.choice, 0)
        if event.logprobs:
            self._length[event.choice] = before + sum(len(token.token) for token in event.logprobs)
        elif event.choice not in self._around:
            self.only_text_comes(event.choice, self._chunk(event.choice, _TEXT, None))
        return self._chunk(event.choice, event.text, text_logprobs(event.logprobs, before))

    def on_choice_end(self, event: ChoiceFinished) -> dict[str, Any]:
        return self._chunk(event.choice, "", None, event.reason)

    def _chunk(
        self, choice: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return self.object(
            [{"index": self.offset + choice, "text": text, "logprobs": logprobs, "finish_reason": reason}]
        )

    def head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.job_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }
