"""The engine's thread: takes what came in, runs a prefill chunk and a decode step, hands out the tokens, again.

All torch work happens here, so the event loop never waits for a forward pass. Other threads only put commands into
the inbox; tokens leave once per pass over all sequences, by one ``deliver`` call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from tokenfleet.engines.base import TokenChunk
from tokenfleet.engines.transformers_engine.batch import Batch, Prefill, PromptPass, Row
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.loading import LoadedModel
from tokenfleet.engines.transformers_engine.sampling import Drawn
from tokenfleet.wire.errors import EngineDead, EngineError

Outcome = TokenChunk | EngineError
Deliveries = list[tuple[Any, Any]]
"""(receiver, outcome): a chunk or an error for a sequence, scores or an error for a scoring job."""

_FAILURES_UNTIL_DEAD = 3
_PADDING_ALLOWED = 1.25
"""Prompts share a prefill if the longest is at most this much longer than the shortest."""


class ScoreWork:
    """Texts to score, a few at a time, so that chats go on in between."""

    def __init__(self, texts_ids: list[tuple[int, ...]], adapter: str | None, receiver: object) -> None:
        self.receiver = receiver
        self._texts_ids = texts_ids
        self._adapter = adapter
        self._scores = [0.0] * len(texts_ids)
        self._left = sorted(range(len(texts_ids)), key=lambda place: len(texts_ids[place]), reverse=True)
        self._taken: list[int] = []
        self._pass: PromptPass | None = None

    def run(self, model: LoadedModel, chunk_tokens: int) -> list[float] | None:
        """One forward pass; all scores after the last."""
        if self._pass is None:
            self._take(chunk_tokens)
            prompts = [(self._texts_ids[place], self._adapter) for place in self._taken]
            self._pass = PromptPass(prompts, model.layers, chunk_tokens)
        rewards = self._pass.run(model.reward)
        if rewards is None:
            return None
        for place, reward in zip(self._taken, rewards.tolist(), strict=True):
            self._scores[place] = reward
        self._pass = None
        return None if self._left else self._scores

    def _take(self, chunk_tokens: int) -> None:
        """The next texts, of similar length, as many as a chunk holds."""
        longest = len(self._texts_ids[self._left[-1]])
        self._taken = []
        while self._left:
            length = max(longest, len(self._texts_ids[self._left[-1]]))
            if self._taken and length * (len(self._taken) + 1) > chunk_tokens:
                break
            longest = length
            self._taken.append(self._left.pop())


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
        self._batches: dict[object, Batch] = {}
        self._out: Deliveries = []
        self._failures = 0

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
    def running(self) -> int:
        return sum(len(prefill.rows) for prefill in list(self._prefills)) + sum(
            len(batch.rows) for batch in list(self._batches.values())
        )

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
                    self._failures = 0
                except Exception as error:  # noqa: BLE001  # the outermost frame of a step: the thread must live on
                    self._survive(error)
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
            (self._waiting if isinstance(work, Row) else self._scoring).append(work)  # type: ignore[arg-type]
        if aborted:
            self._remove(aborted)
        return not self._is_closing

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._scoring or self._prefills or self._batches)

    def _remove(self, receivers: set[object]) -> None:
        self._waiting = deque(row for row in self._waiting if row.stream not in receivers)
        self._scoring = deque(work for work in self._scoring if work.receiver not in receivers)
        for prefill in self._prefills:
            prefill.rows = [row for row in prefill.rows if row.stream not in receivers]
        self._prefills = deque(prefill for prefill in self._prefills if prefill.rows)
        for batch in self._batches.values():
            for row in [row for row in batch.rows if row.stream in receivers]:
                batch.leave(row)
        self._forget_empty()

    def _step(self) -> None:
        self._admit()
        if self._prefills:
            self._run_prefill(self._prefills.popleft())
            self.steps += 1
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
        while self._waiting and len(running) < self._slots:
            longest = max(longest, self._waiting[0].reserved_tokens)
            if running and BatchCache.tokens_for(len(running) + 1, longest) > self._budget_tokens:
                break
            row = self._waiting.popleft()
            running.append(row)
            admitted.append(row)
        self._prefills.extend(self._groups(admitted))

    def _groups(self, rows: list[Row]) -> list[Prefill]:
        """Prefills of rows with similar lengths, none larger than a chunk unless a single prompt is."""
        chunk = self._chunk_tokens if self._batches else 4 * self._chunk_tokens
        groups: list[list[Row]] = []
        keys: list[tuple[object, set[object]]] = []
        for row in sorted(rows, key=lambda row: len(row.prefix)):
            key = self._model.batch_key(row.sequence.adapter)
            if groups and keys[-1][0] == key:
                distinct = keys[-1][1] | {(row.prefix, row.sequence.adapter)}
                shortest = len(groups[-1][0].prefix)
                is_similar = len(row.prefix) <= shortest * _PADDING_ALLOWED + 8
                if len(distinct) == len(keys[-1][1]) or (is_similar and len(distinct) * len(row.prefix) <= chunk):
                    groups[-1].append(row)
                    keys[-1] = (key, distinct)
                    continue
            groups.append([row])
            keys.append((key, {(row.prefix, row.sequence.adapter)}))
        return [Prefill(group, self._model, chunk) for group in groups]

    def _run_prefill(self, prefill: Prefill) -> None:
        try:
            drawn = prefill.run()
        except Exception as error:
            self._fail(prefill.rows, error)
            raise
        if drawn is None:
            # Others get their turn: a long prompt must not keep a short one from starting.
            self._prefills.append(prefill)
            return
        going_on = [row for row, token in zip(prefill.rows, drawn, strict=True) if self._emit(row, token)]
        if going_on:
            key = self._model.batch_key(going_on[0].sequence.adapter)
            if key not in self._batches:
                self._batches[key] = Batch(self._model)
            self._batches[key].join(prefill, going_on)

    def _decode(self, batch: Batch) -> None:
        try:
            drawn = batch.decode()
        except Exception as error:
            victims = list(batch.rows)
            if _is_out_of_memory(error):
                # The cache is as before the step: without the largest row the others can go on.
                victims = [max(victims, key=lambda row: row.reserved_tokens)]
            self._fail(victims, error)
            for row in victims:
                batch.leave(row)
            self._forget_empty()
            raise
        for row, token in zip(list(batch.rows), drawn, strict=True):
            if not self._emit(row, token):
                batch.leave(row)
        self._forget_empty()

    def _forget_empty(self) -> None:
        self._batches = {key: batch for key, batch in self._batches.items() if batch.rows}

    def _emit(self, row: Row, drawn: Drawn) -> bool:
        """Hand a token to its receiver; False if the sequence is over."""
        if drawn.id < 0:
            self._out.append((row.stream, EngineError("The model's output is not a number for this request.")))
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
        self._out += [(row.stream, _translated(error)) for row in rows]

    def _survive(self, error: Exception) -> None:
        """Whom a failed step belonged to has been told; decide whether the next can work."""
        self._failures += 1
        is_sticky = "CUDA error" in str(error) or isinstance(error, torch.AcceleratorError)
        if (is_sticky and not _is_out_of_memory(error)) or self._failures >= _FAILURES_UNTIL_DEAD:
            self.dead = EngineDead(f"The transformers engine stopped: {type(error).__name__}: {error}")
            self.dead.__cause__ = error

    def _end_all(self, outcome: Outcome) -> None:
        with self._wakeup:
            self._is_closing = True
            arrived, self._inbox = self._inbox, []
        rows = [*self._waiting, *(row for prefill in self._prefills for row in prefill.rows)]
        rows += [row for batch in self._batches.values() for row in batch.rows]
        rows += [work for work in arrived if isinstance(work, Row)]
        scoring = [*self._scoring, *(work for work in arrived if isinstance(work, ScoreWork))]
        self._out += [(row.stream, outcome) for row in rows]
        gone = outcome if isinstance(outcome, EngineError) else EngineDead("The engine was closed.")
        self._out += [(work.receiver, gone) for work in scoring]
        self._waiting.clear()
        self._scoring.clear()
        self._prefills.clear()
        self._batches = {}

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
