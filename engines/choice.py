"""One choice's way from token ids to events: detokenising, stop strings, logprobs, and where deltas may be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenfleet.engines.base import RawLogprob, TokenChunk
from tokenfleet.engines.stopping import StopMatcher, ending_ids
from tokenfleet.engines.tokenizer import Tokenizer
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import EngineError
from tokenfleet.wire.events import ChoiceFinished, Delta, TokenLogprob, TopLogprob

_NOT_A_CUT = -1


@dataclass(frozen=True, slots=True)
class DeliveredChoice:
    """What earlier attempts delivered of a choice, from its log. ``is_finished``: its `ChoiceFinished` is there too."""

    ids: tuple[int, ...] = ()
    text: str = ""
    is_finished: bool = False


class ChoiceText:
    """Turns a choice's `TokenChunk`s into `Delta`s, then one `ChoiceFinished`.

    A delta ends only after a token whose text, and that of all before it, is final: no open character, no beginning
    of a stop string. Tokens after it are held and are not in the log, so the state at a cut follows from the ids
    before it, and `resume` can rebuild it. A stop string counts once more than ``min_tokens`` tokens are there, as
    EOS does.
    """

    __slots__ = (
        "_armed_at", "_choice", "_ending", "_ends", "_has_stops", "_held", "_index", "_logprobs", "_matcher",
        "_max_new_tokens", "_stream", "_text", "_tokenizer", "_wants_logprobs", "is_finished",
    )  # fmt: skip

    def __init__(
        self,
        choice: int,
        tokenizer: Tokenizer,
        params: GenerationParams,
        max_new_tokens: int,
        *,
        eos_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        visible_ids: frozenset[int] = frozenset(),
    ) -> None:
        # A special token that is a stop string, written out, would pass unseen if its text were left out.
        visible_ids |= {number for word in params.stop if (number := tokenizer.special_id(word)) is not None}
        self._choice = choice
        self._tokenizer = tokenizer
        self._stream = tokenizer.decode_stream(skip_special_tokens=params.skip_special_tokens, visible_ids=visible_ids)
        self._matcher = StopMatcher((*params.stop, *stop))
        self._has_stops = bool(params.stop or stop)
        self._armed_at = params.min_tokens
        self._ending = ending_ids(params, eos_ids)
        self._max_new_tokens = max_new_tokens
        self._wants_logprobs = params.logprobs
        self._index = 0  # of the first held token
        self._held: list[int] = []
        self._ends: list[int] = []  # per held token: where its text ends in _text, or _NOT_A_CUT
        self._text = ""  # of the held tokens
        self._logprobs: list[RawLogprob] = []
        self.is_finished = False

    def feed(self, chunk: TokenChunk) -> list[Delta | ChoiceFinished]:
        """The events these tokens make: at most one delta, and the end. After the end, chunks are of no interest."""
        assert not self.is_finished
        ids, reason = chunk.ids, chunk.finish_reason
        if self._wants_logprobs:
            self._logprobs += chunk.logprobs
        last = ids[-1] if ids and reason == "stop" else None
        held, ends, stream, has_stops = self._held, self._ends, self._stream, self._has_stops
        for token_id in ids if last is None else ids[:-1]:
            piece = stream.push(token_id)
            held.append(token_id)
            if has_stops and (stop := self._match(piece)) is not None:
                return self._end("stop", stop)
            self._text += piece
            ends.append(_NOT_A_CUT if stream.is_open else len(self._text))
        match reason:
            case None:
                return self._cut()
            case "cancelled":
                events = self._cut()
                self.is_finished = True
                return [*events, ChoiceFinished(self._choice, reason, self._index)]
            case _:
                piece = self._stream.flush()
                if (stop := self._match(piece)) is not None:
                    return self._end("stop", stop)
                self._text += piece
                if last is not None:
                    held.append(last)
                return self._end(reason, None)

    def _match(self, piece: str) -> str | None:
        """The stop string that ``piece`` completes, if any; then the text before it is in place."""
        armed = self._index + len(self._held) > self._armed_at
        found = self._matcher.push(piece, armed=armed)
        if found is None:
            return None
        start = len(self._text) + found.end - len(found.stop)
        self._text = (self._text + piece)[: max(start, 0)]
        return found.stop

    def _end(self, reason: str, stop: str | None) -> list[Delta | ChoiceFinished]:
        self.is_finished = True
        events: list[Delta | ChoiceFinished] = []
        if self._held:
            events.append(self._delta(len(self._held), len(self._text)))
        events.append(ChoiceFinished(self._choice, reason, self._index, stop))
        return events

    def _cut(self) -> list[Delta | ChoiceFinished]:
        """The longest run of held tokens whose text is final."""
        ends = self._ends
        final = len(self._text) - self._matcher.open_chars
        for count in range(len(ends), 0, -1):
            if _NOT_A_CUT != ends[count - 1] <= final:
                return [self._delta(count, ends[count - 1])]
        return []

    def _delta(self, count: int, end: int) -> Delta:
        logprobs = tuple(map(self._logprob, self._logprobs[:count])) if self._wants_logprobs else ()
        delta = Delta(self._choice, self._index, tuple(self._held[:count]), self._text[:end], logprobs)
        self._index += count
        if count == len(self._held):
            self._held.clear()
            self._ends.clear()
            self._logprobs.clear()
            self._text = ""
        else:
            del self._held[:count], self._ends[:count], self._logprobs[:count]
            self._text = self._text[end:]
            self._ends[:] = [each if each == _NOT_A_CUT else each - end for each in self._ends]
        return delta

    def _logprob(self, raw: RawLogprob) -> TokenLogprob:
        text = self._tokenizer.token_text
        top = tuple(TopLogprob(token_id, text(token_id), logprob) for token_id, logprob in raw.top)
        return TokenLogprob(raw.id, text(raw.id), raw.logprob, top)

    def resume(self, delivered: DeliveredChoice) -> ChoiceFinished | None:
        """Take over after ``delivered``; its end, if all of the choice is there but for the `ChoiceFinished`.

        Raises `EngineError` (``continuation_mismatch``) if these ids are not this text here."""
        ids = delivered.ids
        wants_logprobs, self._wants_logprobs = self._wants_logprobs, False
        chunk = TokenChunk(ids)
        if ids and ids[-1] in self._ending and len(ids) > self._armed_at:
            chunk = TokenChunk(ids, finish_reason="stop")
        elif len(ids) >= self._max_new_tokens:
            chunk = TokenChunk(ids, finish_reason="length")
        events = self.feed(chunk)
        self._wants_logprobs = wants_logprobs
        text = "".join(event.text for event in events if isinstance(event, Delta)) + self._text
        if text != delivered.text:
            raise EngineError(
                f"The {len(ids)} tokens delivered of choice {self._choice} read otherwise in this worker.",
                code="continuation_mismatch",
                hint="Its tokenizer or stop strings are not those of the worker that began the job.",
            )
        # Nothing is held here, unless a release with other rules made the cut; then it is out all the same.
        self._held, self._ends, self._text = [], [], ""
        self._index = len(ids)
        return events[-1] if events and isinstance(events[-1], ChoiceFinished) else None
