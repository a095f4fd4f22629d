"""Events put together: the whole answer, and a check that nothing is missing."""

from __future__ import annotations

from tokenfleet.wire.errors import LostState
from tokenfleet.wire.events import (
    TERMINAL,
    AnyEvent,
    Cancelled,
    ChoiceFinished,
    Delta,
    Expired,
    Failed,
    Finished,
    Started,
)
from tokenfleet.wire.results import ChatResult, ChoiceBuilder


class Assembly:
    """Feed it all events of a job, in order, from the first; then ask for `result`."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.terminal: Finished | Failed | Cancelled | Expired | None = None
        self._choices: dict[int, ChoiceBuilder] = {}
        self._started: Started | None = None

    def add(self, event: AnyEvent) -> None:
        """Raises `LostState` if a delta does not join the ones before it."""
        if isinstance(event, Delta):
            choice = self._choice(event.choice)
            if event.index != len(choice.ids):
                raise LostState(f"Job {self.job_id}: choice {event.choice} misses tokens before {event.index}.")
            choice.add(event)
        elif isinstance(event, ChoiceFinished):
            self._choice(event.choice).finish(event)
        elif isinstance(event, Started):
            self._started = event
        elif isinstance(event, TERMINAL):
            self.terminal = event

    def result(self) -> ChatResult:
        """What has been delivered so far."""
        choices = tuple(self._choices[index].build() for index in sorted(self._choices))
        parser = self._started.parser if self._started else {}
        if self.terminal is None:
            return ChatResult(self.job_id, choices, parser=parser)
        scores = self.terminal.scores if isinstance(self.terminal, Finished) else None
        return ChatResult(self.job_id, choices, self.terminal.usage, scores, parser)

    def _choice(self, index: int) -> ChoiceBuilder:
        return self._choices.setdefault(index, ChoiceBuilder(index))
