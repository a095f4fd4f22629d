"""A job's log as the events of a Responses stream: a fold over its prefix.

What comes out for an event depends on the events before it alone, never on when or by whom the log is read. So
``sequence_number`` counts the same on every gateway, and a reader may go on at any number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, assert_never

from tokenfleet.producer.gateway.answers import ReasoningCount
from tokenfleet.producer.gateway.response_items import Asked, response_error
from tokenfleet.producer.gateway.response_output import Output
from tokenfleet.wire.events import (
    AnyEvent,
    Cancelled,
    ChoiceFinished,
    Delta,
    Expired,
    Failed,
    Finished,
    Queued,
    Started,
    Usage,
)

Shown = dict[str, Any]


@dataclass
class ResponseFold:
    """Feed it every event from the first on. ``response`` is the object as of now."""

    response_id: str
    job_id: str
    asked: Asked
    next_number: int = 0
    status: str = "in_progress"
    created: int = 0
    usage: Usage | None = None
    error: Shown | None = None
    incomplete: Shown | None = None
    _reasoning: ReasoningCount = field(default_factory=ReasoningCount)
    _output: Output | None = None

    def feed(self, event: AnyEvent) -> list[Shown]:
        """The events of the stream that follow from ``event``, in order, each with its ``sequence_number``."""
        events = self._react(event)
        for shown in events:
            shown["sequence_number"] = self.next_number
            self.next_number += 1
        return events

    def _react(self, event: AnyEvent) -> list[Shown]:
        match event:
            case Queued(t_ms=t_ms):
                self.created = t_ms // 1000
                if not self.asked.background:
                    return [self._about("response.created")]
                self.status = "queued"
                return [self._about("response.created"), self._about("response.queued")]
            case Started(parser=parser):
                self._reasoning.add(event)
                if self._output is not None:  # another worker goes on: nothing new to the reader
                    return []
                self._output = Output(parser, self.job_id)
                self.status = "in_progress"
                return [self._about("response.in_progress")]
            case Delta():
                events = self._writer.add(event)
                self._reasoning.count(event, self._writer.thought_chars, is_thinking=self._writer.is_thinking)
                return events
            case ChoiceFinished(reason=reason):
                if reason == "length":
                    self.incomplete = {"reason": "max_output_tokens"}
                return self._writer.close(is_whole=reason != "length")
            case Finished(usage=usage):
                self.usage = usage
                self.status = "incomplete" if self.incomplete else "completed"
                return [self._about(f"response.{self.status}")]
            case Failed(error=error, usage=usage) | Expired(error=error, usage=usage):
                return self._end("failed", "response.failed", usage, response_error(error.code, error.message))
            case Cancelled(usage=usage):
                # OpenAI has no event of its own for it; agents take this one as an end with what there is.
                return self._end("cancelled", "response.incomplete", usage, None)
            case _:
                assert_never(event)

    def _end(self, status: str, kind: str, usage: Usage, error: Shown | None) -> list[Shown]:
        events = self._output.close(is_whole=False) if self._output else []
        self.status, self.usage, self.error = status, usage, error
        return [*events, self._about(kind)]

    @property
    def _writer(self) -> Output:
        assert self._output is not None, "tokens before a start"
        return self._output

    def _about(self, kind: str) -> Shown:
        return {"type": kind, "response": self.response}

    @property
    def response(self) -> Shown:
        return {
            **self.asked.echo,
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": self.incomplete,
            "output": list(self._output.items) if self._output else [],
            "usage": self._usage(),
        }

    def _usage(self) -> Shown | None:
        if self.usage is None:
            return None
        return {
            "input_tokens": self.usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning.tokens},
            "total_tokens": self.usage.total_tokens,
        }
