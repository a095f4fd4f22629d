"""The output items of a response, as its text is written: thoughts, messages and function calls, with their events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenfleet.producer.gateway.answers import logprob_object
from tokenfleet.producer.gateway.response_items import item_id
from tokenfleet.wire.events import Delta
from tokenfleet.wire.toolcalls import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta, ToolParser, choice_key

Shown = dict[str, Any]


class Output:
    """``items`` are the complete ones. Their ids follow from the job and their place."""

    def __init__(self, parser: Mapping[str, Any], job_id: str) -> None:
        self.items: list[Shown] = []
        self._parser = ToolParser(parser, key=choice_key(job_id, 0))
        self._job_id = job_id
        self._open: Shown | None = None
        self._text: list[str] = []
        self._logprobs: list[Shown] = []
        self._events: list[Shown] = []

    @property
    def is_thinking(self) -> bool:
        return self._parser.is_thinking

    @property
    def thought_chars(self) -> int:
        return self._parser.thought_chars

    def add(self, delta: Delta) -> list[Shown]:
        """The events that follow from new tokens."""
        logprobs = [logprob_object(token) for token in delta.logprobs]
        for part in self._parser.feed(delta.text):
            self._part(part, logprobs)
            if isinstance(part, ContentDelta):
                logprobs = []
        return self._taken()

    def close(self, *, is_whole: bool) -> list[Shown]:
        """No more tokens: what is open ends, ``incomplete`` unless the answer is whole."""
        for part in self._parser.close():
            self._part(part, [])
        self._finish("completed" if is_whole else "incomplete")
        return self._taken()

    def _taken(self) -> list[Shown]:
        events, self._events = self._events, []
        return events

    def _part(self, part: ParsedDelta, logprobs: list[Shown]) -> None:
        match part:
            case ContentDelta(text=text):
                self._begin("message", {"role": "assistant", "content": []}, "output_text")
                self._grow("response.output_text.delta", text, content_index=0, logprobs=logprobs)
                self._logprobs += logprobs
            case ReasoningDelta(text=text):
                self._begin("reasoning", {"summary": [], "content": []}, "reasoning_text")
                self._grow("response.reasoning_text.delta", text, content_index=0)
            case ToolCallDelta(id=call_id, name=name, arguments=arguments):
                if call_id is not None:
                    self._finish("completed")
                    self._begin("function_call", {"call_id": call_id, "name": name, "arguments": ""}, None)
                if arguments:
                    self._grow("response.function_call_arguments.delta", arguments)

    def _begin(self, kind: str, fields: Shown, part: str | None) -> None:
        if self._open is not None and self._open["type"] == kind and kind != "function_call":
            return
        self._finish("completed")
        place = len(self.items)
        item = {"id": item_id(kind, self._job_id, place), "type": kind, "status": "in_progress", **fields}
        self._open, self._text, self._logprobs = item, [], []
        self._events.append({"type": "response.output_item.added", "output_index": place, "item": item})
        if part is not None:
            self._say("response.content_part.added", content_index=0, part=_part_of(part, "", []))

    def _grow(self, kind: str, text: str, **fields: Any) -> None:
        self._text.append(text)
        self._say(kind, delta=text, **fields)

    def _say(self, kind: str, **fields: Any) -> None:
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self.items)}
        self._events.append({"type": kind, **where, **fields})

    def _finish(self, status: str) -> None:
        if self._open is None:
            return
        text, item = "".join(self._text), {**self._open, "status": status}
        match item["type"]:
            case "function_call":
                self._say("response.function_call_arguments.done", arguments=text, name=item["name"])
                item["arguments"] = text
            case "reasoning":
                self._say("response.reasoning_text.done", content_index=0, text=text)
                self._end_part(item, _part_of("reasoning_text", text, []))
            case _:
                self._say("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
                self._end_part(item, _part_of("output_text", text, self._logprobs))
        self._events.append({"type": "response.output_item.done", "output_index": len(self.items), "item": item})
        self.items.append(item)
        self._open = None

    def _end_part(self, item: Shown, part: Shown) -> None:
        self._say("response.content_part.done", content_index=0, part=part)
        item["content"] = [part]


def _part_of(kind: str, text: str, logprobs: list[Shown]) -> Shown:
    if kind == "reasoning_text":
        return {"type": kind, "text": text}
    return {"type": kind, "text": text, "annotations": [], "logprobs": logprobs}
