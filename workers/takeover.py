"""What an earlier attempt left in the log: the state from which the next owner continues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenfleet.wire.errors import LostState
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta
from tokenfleet.wire.results import ChoiceBuilder


@dataclass(slots=True)
class Delivered:
    """Everything delivered so far, per choice. Text and ids of a choice grow with `add`, over all attempts."""

    choices: dict[int, ChoiceBuilder] = field(default_factory=dict)

    def add(self, event: AnyEvent) -> None:
        """Raises `LostState` if a delta does not join the ones before it."""
        match event:
            case Delta():
                choice = self.choices.setdefault(event.choice, ChoiceBuilder(event.choice))
                if event.index != len(choice.ids):
                    raise LostState(f"choice {event.choice} has {len(choice.ids)} tokens, then one at {event.index}")
                choice.add(event)
            case ChoiceFinished():
                self.choices.setdefault(event.choice, ChoiceBuilder(event.choice)).finish(event)
            case _:
                pass

    @classmethod
    def from_log(cls, events: Iterable[AnyEvent]) -> Delivered:
        delivered = cls()
        for event in events:
            delivered.add(event)
        return delivered

    @property
    def tokens(self) -> int:
        return sum(len(choice.ids) for choice in self.choices.values())
