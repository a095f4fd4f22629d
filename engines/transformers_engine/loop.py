"""The engine's thread: takes what came in, runs a prefill chunk and a decode step, hands out the tokens, again.

All torch work happens here, so the event loop never waits for a forward pass. Other threads only put commands into
the inbox; tokens leave once per pass over all sequences, by one ``deliver`` call.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from tokenfleet.engines.base import TokenChunk
from tokenfleet.engines.transformers_engine.batch import Batch, Prefill, PromptPass, Row, prefill_groups
from tokenfleet.engines.transformers_engine.beams import SearchBatch, SearchRow
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.loading import LoadedModel
from tokenfleet.engines.transformers_engine.sampling import Drawn
from tokenfleet.engines.transformers_engine.scoring import ScoreWork
from tokenfleet.wire.errors import EngineDead, EngineError

Outcome = TokenChunk | EngineError
Deliveries = list[tuple[Any, Any]]
"""(receiver, outcome): a chunk or an error for a sequence, scores or an error for a scoring job."""

_IDLE_CHUNKS = 4
"""A chunk is this much larger while nobody waits for a decode step."""


class EngineLoop:
    def __init__(
        self,
        model: LoadedModel,
        *,
        slots: int,
        budget_tokens: int,
        chunk_tokens: int,
        deliver: Callable[[Deliveries], None],
    ) -> None:
        self.steps = 0
        self.running = 0
        """Sequences that hold a slot; set between phases, so that none is counted twice on its way into a batch."""
        self.dead: EngineDead | None = None
        self._model = model
        self._slots = slots
        self._budget_tokens = budget_tokens
        self._chunk_tokens = chunk_tokens
        self._deliver = deliver
        self._wakeup = threading.Condition()
        self._inbox: list[Row | ScoreWork] = []
        self._aborted: set[object] = set()
        self._is_closing = False
        self._waiting: deque[Row] = deque()
        self._scoring: deque[ScoreWork] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batches: dict[object, Batch | SearchBatch] = {}
        self._out: Deliveries = []

    # Called from other threads.

    def submit(self, work: Row | ScoreWork) -> None:
        with self._wakeup:
            if self._is_closing:
                raise self.dead or EngineDead("The engine was closed.")
            self._inbox.append(work)
            self._wakeup.notify()

    def abort(self, receiver: object) -> None:
        with self._wakeup:
            self._aborted.add(receiver)
            self._wakeup.notify()

    def close(self) -> None:
        with self._wakeup:
            self._is_closing = True
            self._wakeup.notify()

    @property
    def held_tokens(self) -> int:
        """Tokens there is cache memory for now."""
        return sum(batch.held_tokens for batch in list(self._batches.values())) + sum(
            prefill.cache.held_tokens for prefill in list(self._prefills)
        )

    # The thread.

    def run(self) -> None:
        """Until `close`. Whatever is still there then is cancelled; if the model is beyond use, it is failed."""
        with torch.inference_mode():
            while self._take_in():
                try:
                    self._step()
                except Exception as error:  # noqa: BLE001  # the outermost frame of a step: the thread must live on
                    # It goes on to whoever asked: it must not take the pass's tensors along, others want the memory.
                    traceback.clear_frames(error.__traceback__)
                    self._survive(error)
                self._count()
                self._hand_out()
                if self.dead:
                    break
        self._end_all(self.dead or TokenChunk((), (), "cancelled"))
        self._hand_out()

    def _take_in(self) -> bool:
        """Wait for work; False once closing."""
        with self._wakeup:
            while not (self._inbox or self._aborted or self._has_work or self._is_closing):
                self._wakeup.wait()
            arrived, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, set()
        for work in arrived:
            if isinstance(work, ScoreWork):
                self._scoring.append(work)
            elif not self._shares_a_search(work):
                self._waiting.append(work)
        if aborted:
            self._remove(aborted)
            self._count()
        return not self._is_closing

    def _shares_a_search(self, row: Row) -> bool:
        """Choices of one job are texts of one beam search: the first to come brings it, the others ask for theirs."""
        if not isinstance(row, SearchRow) or not row.job:
            return False
        known = [*self._waiting, *(one for prefill in self._prefills for one in prefill.rows)]
        known += [one for batch in self._batches.values() for one in batch.rows]
        for one in known:
            if isinstance(one, SearchRow) and one.job == row.job:
                one.ranks.update(row.ranks)
                return True
        return False

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._scoring or self._prefills or self._batches)

    def _remove(self, receivers: set[object]) -> None:
        self._waiting = deque(row for row in self._waiting if not row.leave(receivers))
        self._scoring = deque(work for work in self._scoring if work.receiver not in receivers)
        for prefill in self._prefills:
            prefill.rows = [row for row in prefill.rows if not row.leave(receivers)]
        self._prefills = deque(prefill for prefill in self._prefills if prefill.rows)
        for batch in self._batches.values():
            for row in [row for row in batch.rows if row.leave(receivers)]:
                batch.leave(row)
        self._batches = {key: batch for key, batch in self._batches.items() if batch.rows}

    def _step(self) -> None:
        self._admit()
        self._count()
        if self._prefills:
            self._run_prefill(self._prefills[0])
            self.steps += 1
            self._count()
            self._hand_out()
        for batch in list(self._batches.values()):
            self._decode(batch)
            self.steps += 1
        if self._scoring:
            self._run_scores(self._scoring[0])
            self.steps += 1

    def _admit(self) -> None:
        """Give slots to waiting sequences in their order, as long as all that run could grow to their full length."""
        admitted: list[Row] = []
        running = [row for prefill in self._prefills for row in prefill.rows]
        running += [row for batch in self._batches.values() for row in batch.rows]
        longest = max((row.reserved_tokens for row in running), default=0)
        width = sum(row.width for row in running)
        while self._waiting and width + self._waiting[0].width <= self._slots:
            longest = max(longest, self._waiting[0].reserved_tokens)
            width += self._waiting[0].width
            if (running or admitted) and BatchCache.tokens_for(width, longest) > self._budget_tokens:
                break
            admitted.append(self._waiting.popleft())
        chunk = self._chunk_tokens if self._batches else _IDLE_CHUNKS * self._chunk_tokens
        self._prefills.extend(prefill_groups(admitted, self._key, self._model, chunk))

    def _run_prefill(self, prefill: Prefill) -> None:
        first = prefill.rows[0]
        drawn: list[Drawn] | None = None
        search: SearchBatch | None = None
        try:
            if not isinstance(first, SearchRow):
                drawn = prefill.run()
            elif (logits := prefill.read()) is not None:
                search = SearchBatch(first, prefill, logits, self._model)
        except Exception as error:
            self._prefills.popleft()
            self._try_apart(prefill.rows, error)
            raise
        if search is not None:
            self._prefills.popleft()
            self._batches[self._key(first)] = search
            return
        if drawn is None:
            # Others get their turn: a long prompt must not keep a short one from starting.
            self._prefills.rotate(-1)
            return
        going_on = [row for row, token in zip(prefill.rows, drawn, strict=True) if self._emit(row, token)]
        self._prefills.popleft()
        if not going_on:
            return
        batch = self._batches.setdefault(self._key(going_on[0]), Batch(self._model))
        assert isinstance(batch, Batch)
        try:
            batch.join(prefill, going_on)
        except Exception as error:
            self._forget(batch)
            self._try_apart([*batch.rows, *going_on], error)
            raise

    def _decode(self, batch: Batch | SearchBatch) -> None:
        try:
            drawn = batch.decode()
        except Exception as error:
            self._forget(batch)
            self._try_apart(batch.rows, error)
            raise
        if isinstance(batch, SearchBatch) or not isinstance(drawn, list):
            if isinstance(drawn, dict):
                self._out += drawn.items()
                self._forget(batch)
            return
        for row, token in zip(list(batch.rows), drawn, strict=True):
            if not self._emit(row, token):
                batch.leave(row)
        if not batch.rows:
            self._forget(batch)

    def _key(self, row: Row) -> object:
        """Rows with equal keys may share a batch."""
        return row if row.is_alone else self._model.batch_key(row.sequence.adapter)

    def _try_apart(self, rows: list[Row], error: Exception) -> None:
        """After a failed pass: all but whoever is to blame go on, from their prompts and the tokens they have.

        For want of memory the largest has to go; for any other reason each is tried alone, and fails alone."""
        if len(rows) == 1:
            self._fail(rows, error)
        elif _is_out_of_memory(error):
            largest = max(rows, key=lambda row: row.reserved_tokens)
            self._fail([largest], error)
            self._waiting.extendleft(row for row in reversed(rows) if row is not largest)
        else:
            for row in rows:
                row.is_suspect = True
            self._prefills.extend(Prefill([row], self._model, self._chunk_tokens) for row in rows)

    def _forget(self, batch: Batch | SearchBatch) -> None:
        self._batches = {key: other for key, other in self._batches.items() if other is not batch}

    def _emit(self, row: Row, drawn: Drawn) -> bool:
        """Hand a token to its receiver; False if the sequence is over."""
        if drawn.id < 0:
            self._out.append((row.stream, EngineError("The model gave no usable output for this request.")))
            return False
        try:
            chunk = row.take(drawn)
        except EngineError as error:  # its grammar is at a loss
            self._out.append((row.stream, error))
            return False
        self._out.append((row.stream, chunk))
        return chunk.finish_reason is None

    def _run_scores(self, work: ScoreWork) -> None:
        outcome: Any
        try:
            outcome = work.run(self._model, self._chunk_tokens)
        except Exception as error:
            self._scoring.popleft()
            self._out.append((work.receiver, _translated(error)))
            raise
        if outcome is not None:
            self._scoring.popleft()
            self._out.append((work.receiver, outcome))

    def _fail(self, rows: list[Row], error: Exception) -> None:
        self._out += [(stream, _translated(error)) for row in rows for stream in row.streams]

    def _survive(self, error: Exception) -> None:
        """Whom a failed pass belonged to has been dealt with; find out whether the model still works at all."""
        try:
            PromptPass([((1,), None)], self._model.layers, 8).run(self._model.first_pass)
        except Exception as still:  # noqa: BLE001  # whatever it is, nothing can be computed any more
            if not _is_out_of_memory(still):
                self.dead = EngineDead(f"The transformers engine can't compute any more: {type(still).__name__}.")
                self.dead.__cause__ = error

    def _end_all(self, outcome: Outcome) -> None:
        with self._wakeup:
            self._is_closing = True
            arrived, self._inbox = self._inbox, []
        rows = [*self._waiting, *(row for prefill in self._prefills for row in prefill.rows)]
        rows += [row for batch in self._batches.values() for row in batch.rows]
        rows += [work for work in arrived if isinstance(work, Row)]
        scoring = [*self._scoring, *(work for work in arrived if isinstance(work, ScoreWork))]
        self._out += [(stream, outcome) for row in rows for stream in row.streams]
        gone = outcome if isinstance(outcome, EngineError) else EngineDead("The engine was closed.")
        self._out += [(work.receiver, gone) for work in scoring]
        self._waiting.clear()
        self._scoring.clear()
        self._prefills.clear()
        self._batches = {}
        self.running = 0

    def _count(self) -> None:
        prefilling = sum(row.width for prefill in self._prefills for row in prefill.rows)
        self.running = prefilling + sum(row.width for batch in self._batches.values() for row in batch.rows)

    def _hand_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._deliver(out)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _translated(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    if _is_out_of_memory(error):
        failed = EngineError(
            "The engine ran out of memory on this request.",
            code="out_of_memory",
            hint="Lower kv_budget_tokens or max_batch_size.",
        )
    else:
        failed = EngineError(f"The model failed on this request: {type(error).__name__}.")
    failed.__cause__ = error
    return failed
