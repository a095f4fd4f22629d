"""One choice's events read as content, thoughts and tool calls while they come."""

from __future__ import annotations

from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, Started
from tokenfleet.wire.toolcalls import ParsedDelta, ToolParser, choice_key


class ChoiceReader:
    """Feed it all events of a job, from the first. What comes out is the same for every reader of the job.

    ``cursor``: what of the job's events has been read already. Raises `InvalidRequest` unless that is nothing."""

    def __init__(self, job_id: str, choice: int, cursor: int = 0) -> None:
        if cursor:
            raise InvalidRequest(
                "An answer can be taken apart from its beginning only.", hint="Stream the job from the start."
            )
        self._job_id = job_id
        self._choice = choice
        self._parser: ToolParser | None = None

    def add(self, event: AnyEvent) -> list[ParsedDelta]:
        match event:
            case Started(parser=parser) if self._parser is None:  # a later attempt goes on where the first one stopped
                self._parser = ToolParser(parser, key=choice_key(self._job_id, self._choice))
            case Delta(choice=choice, text=text) if choice == self._choice and self._parser is not None:
                return self._parser.feed(text)
            case ChoiceFinished(choice=choice) if choice == self._choice and self._parser is not None:
                return self._parser.close()
            case _:
                pass
        return []
