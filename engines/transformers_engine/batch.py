"""Forward passes: prompts in chunks, then all running rows one token at a time. Runs in the engine's own thread."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenfleet.engines.base import Sequence, TokenChunk
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.sampling import BatchSampler, Drawn, SamplingState


class Model(Protocol):
    """A loaded model as the batches need it (loading.py has it)."""

    layers: int
    vocab_size: int
    device: torch.device

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Rows[str | None],
    ) -> torch.Tensor:
        """Logits of the last column, ``[rows, vocab]``."""
        ...


@dataclass(slots=True, eq=False)
class Row:
    """One sequence in the engine. ``stream`` is the receiver's, opaque here."""

    sequence: Sequence
    state: SamplingState
    stream: object

    @property
    def prefix(self) -> tuple[int, ...]:
        """What has to be in the cache before the next token can be drawn."""
        return (*self.sequence.prompt_ids, *self.sequence.delivered_ids)

    @property
    def reserved_tokens(self) -> int:
        """The most cache it may ever need."""
        return len(self.sequence.prompt_ids) + self.sequence.max_new_tokens

    def take(self, drawn: Drawn) -> TokenChunk:
        """Append a drawn token; the chunk says whether that was the last."""
        self.state.ids.append(drawn.id)
        reason = None
        if drawn.id in self.state.stop_ids:
            reason = "stop"
        elif len(self.state.ids) >= self.sequence.max_new_tokens:
            reason = "length"
        return TokenChunk((drawn.id,), (drawn.logprob,) if drawn.logprob else (), reason)  # type: ignore[arg-type]


class Prefill:
    """Prompts of similar length, computed together, a chunk a call. Equal prompts (n choices) are computed once."""

    def __init__(self, rows: list[Row], model: Model, chunk_tokens: int) -> None:
        self.rows = rows
        self._model = model
        # Another adapter gives another cache for the same prompt.
        keys = [(row.prefix, row.sequence.adapter) for row in rows]
        distinct = list(dict.fromkeys(keys))
        self._places = {row.stream: distinct.index(key) for row, key in zip(rows, keys, strict=True)}
        self._adapters = [adapter for _, adapter in distinct]
        self._columns = max(len(prefix) for prefix, _ in distinct)
        padded = [[0] * (self._columns - len(prefix)) + list(prefix) for prefix, _ in distinct]
        self._ids = torch.tensor(padded)
        self._step = max(8, chunk_tokens // len(distinct))
        self.cache = BatchCache(model.layers, [len(prefix) - self._columns for prefix, _ in distinct])

    def run(self) -> torch.Tensor | None:
        """Compute the next chunk. After the last one: logits, ``[distinct prompts, vocab]`` (see `place`)."""
        done = self.cache.window.length
        columns = min(self._step, self._columns - done)
        self.cache.make_room(columns)
        mask, positions = self.cache.padding_mask(columns), self.cache.positions(columns)
        logits = self._model.forward(self._ids[:, done : done + columns], mask, positions, self.cache, self._adapters)
        self.cache.advance(columns)
        return logits if done + columns == self._columns else None

    def place(self, row: Row) -> int:
        """The row of ``cache``, and of the logits, that is ``row``'s prompt."""
        return self._places[row.stream]


class Batch:
    """The running rows. Row i of the cache, of ``rows`` and of the logits are the same sequence."""

    def __init__(self, model: Model) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._cache = BatchCache(model.layers)
        self._sampler: BatchSampler | None = None

    @property
    def held_tokens(self) -> int:
        return self._cache.held_tokens

    def join(self, prefill: Prefill, rows: list[Row]) -> None:
        """Take over ``rows`` of a finished prefill, each with its first token drawn."""
        self._cache.join(prefill.cache, [prefill.place(row) for row in rows])
        self.rows += rows
        self._sampler = None

    def leave(self, row: Row) -> None:
        place = self.rows.index(row)
        self._cache.drop(place)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
        self._sampler = None
        if not self.rows:
            self._cache = BatchCache(self._model.layers)  # gives the memory back

    def decode(self) -> list[Drawn]:
        """One forward pass and one token for every row."""
        self._cache.make_room(1)
        ids = torch.tensor([[row.state.ids[-1]] for row in self.rows])
        mask, positions = self._cache.padding_mask(1), self._cache.positions(1)
        adapters = [row.sequence.adapter for row in self.rows]
        logits = self._model.forward(ids, mask, positions, self._cache, adapters)
        self._cache.advance(1)
        if self._sampler is None:
            self._sampler = BatchSampler([row.state for row in self.rows], self._model.vocab_size, logits.device)
        return self._sampler(logits)
