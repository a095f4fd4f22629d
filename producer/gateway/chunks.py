"""A job's events as OpenAI's objects: whole completions and stream chunks. Pure functions of the log's prefix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from tokenfleet.wire.chat import FinishReason
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, Finished, Queued, Started, TokenLogprob, Usage
from tokenfleet.wire.toolcalls import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta, ToolParser, parse


def usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def logprobs_object(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {
        "content": [
            one(t.token, t.logprob) | {"top_logprobs": [one(a.token, a.logprob) for a in t.top]} for t in logprobs
        ],
        "refusal": None,
    }


@dataclass
class ChatChunks:
    """Turns events into ``chat.completion.chunk`` objects, in order."""

    job_id: str
    model: str
    include_usage: bool
    created: int = 0
    _parsers: dict[int, ToolParser] = field(default_factory=dict)
    _parser: dict[str, Any] = field(default_factory=dict)

    def feed(self, event: AnyEvent) -> Iterator[dict[str, Any]]:
        match event:
            case Queued(t_ms=t_ms):
                self.created = t_ms // 1000
            case Started(parser=parser):
                self._parser = parser
            case Delta(choice=choice):
                if choice not in self._parsers:
                    self._parsers[choice] = ToolParser(self._parser, key=f"{self.job_id}:{choice}")
                    yield self._chunk(choice, {"role": "assistant", "content": ""})
                logprobs = logprobs_object(event.logprobs) if event.logprobs else None
                for delta in self._deltas(self._parsers[choice].feed(event.text)):
                    yield self._chunk(choice, delta, logprobs=logprobs)
                    logprobs = None
                if logprobs is not None:  # tokens without text of their own yet
                    yield self._chunk(choice, {}, logprobs=logprobs)
            case ChoiceFinished(choice=choice):
                reader = self._parsers.get(choice) or ToolParser(self._parser, key=f"{self.job_id}:{choice}")
                for delta in self._deltas(reader.close()):
                    yield self._chunk(choice, delta)
                yield self._chunk(choice, {}, reason=reader.finish_reason(cast("FinishReason", event.reason)))
            case Finished(usage=usage) if self.include_usage:
                yield self._object([]) | {"usage": usage_object(usage)}
            case _:
                pass

    def _deltas(self, parsed: list[ParsedDelta]) -> Iterator[dict[str, Any]]:
        for delta in parsed:
            match delta:
                case ContentDelta(text=text):
                    yield {"content": text}
                case ReasoningDelta(text=text):
                    yield {"reasoning_content": text}
                case ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments):
                    function: dict[str, Any] = {"arguments": arguments}
                    call: dict[str, Any] = {"index": index, "function": function}
                    if call_id is not None:
                        call |= {"id": call_id, "type": "function"}
                        function["name"] = name
                    yield {"tool_calls": [call]}

    def _chunk(
        self, choice: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return self._object([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.job_id}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass
class TextChunks:
    """Turns events into ``text_completion`` chunks; ``offset`` is the first choice's number among several prompts."""

    job_id: str
    model: str
    include_usage: bool
    offset: int = 0
    created: int = 0

    def feed(self, event: AnyEvent) -> Iterator[dict[str, Any]]:
        match event:
            case Queued(t_ms=t_ms):
                self.created = t_ms // 1000
            case Delta(choice=choice, text=text):
                yield self._object(choice, text, None)
            case ChoiceFinished(choice=choice, reason=reason):
                yield self._object(choice, "", reason)
            case Finished(usage=usage) if self.include_usage:
                yield self._object(0, "", None) | {"choices": [], "usage": usage_object(usage)}
            case _:
                pass

    def _object(self, choice: int, text: str, reason: str | None) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.job_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": self.offset + choice, "text": text, "logprobs": None, "finish_reason": reason}],
        }


def chat_message(text: str, parser: dict[str, Any], key: str, reason: str) -> tuple[dict[str, Any], str]:
    """A whole choice's message, and its finish reason."""
    parsed = parse(text, parser, key=key)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        message["tool_calls"] = [call.model_dump(mode="json") for call in parsed.tool_calls]
        if reason == "stop":
            reason = "tool_calls"
    return message, reason
