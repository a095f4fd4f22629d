"""Forward passes: prompts in chunks, then all running rows one token at a time. Runs in the engine's own thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from tokenfleet.engines.base import Sequence, TokenChunk
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.sampling import BatchSampler, Drawn, SamplingState

_PADDING_ALLOWED = 1.25
"""Prompts are read together if the longest is at most this much longer than the shortest."""

Adapters = Rows[str | None]
Prompt = tuple[tuple[int, ...], str | None]
"""Token ids and the adapter they are read with."""
Inputs = Mapping[str, Any]
"""What a forward pass takes beside token ids: pixels, sound. Tensors are on the CPU."""


@dataclass(frozen=True, slots=True)
class MediaInputs:
    """Of one prompt; ``digest`` is equal for equal media. ``positions``: ``[1 or more, 1, tokens]``, where the model
    has positions of its own for them; the next token's lies ``offset`` from its place in the text."""

    digest: bytes
    tokens: int
    """The prompt's, all of which must be in one pass."""
    inputs: Inputs
    positions: torch.Tensor | None = None
    offset: int = 0


class Model(Protocol):
    """A loaded model as the batches need it (loading.py has it). ``ids``, ``mask`` and ``positions`` are on the CPU."""

    layers: int
    vocab_size: int

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Adapters,
        media: Inputs | None = None,
    ) -> torch.Tensor:
        """Logits of the last column, ``[rows, vocab]``. Writes the new columns to ``cache`` but doesn't count them."""
        ...


class Forward(Protocol):
    """What `Model.forward` is, or anything that gives a value for each row's last column."""

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Adapters,
        media: Inputs | None = None,
    ) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class Row:
    """One sequence in the engine. ``stream`` is the receiver's, opaque here."""

    sequence: Sequence
    state: SamplingState
    stream: object
    media: MediaInputs | None = None
    is_suspect: bool = False
    """Was in a pass that failed: from then on it gets a batch of its own."""

    @property
    def is_alone(self) -> bool:
        """Has a batch of its own."""
        return self.is_suspect

    @property
    def width(self) -> int:
        """Rows of a cache that it takes."""
        return 1

    @property
    def streams(self) -> tuple[object, ...]:
        """All that get an outcome which is the same for all."""
        return (self.stream,)

    def leave(self, receivers: set[object]) -> bool:
        """``receivers`` are gone; says whether nobody is left."""
        return self.stream in receivers

    @property
    def prefix(self) -> tuple[int, ...]:
        """What has to be in the cache before the next token can be drawn: also after a batch was lost."""
        return (*self.sequence.prompt_ids, *self.state.ids)

    @property
    def prompt_key(self) -> object:
        """Equal for rows whose prefixes leave the same in the cache."""
        return self.prefix, self.sequence.adapter, self.media and self.media.digest

    @property
    def reserved_tokens(self) -> int:
        """The most cache it may ever need."""
        return len(self.sequence.prompt_ids) + self.sequence.max_new_tokens

    def take(self, drawn: Drawn) -> TokenChunk:
        """Append a drawn token; the chunk says whether that was the last."""
        self.state.ids.append(drawn.id)
        if self.state.grammar is not None:
            self.state.grammar.accept(drawn.id)
        reason: Literal["stop", "length"] | None = None
        if drawn.id in self.state.stop_ids:
            reason = "stop"
        elif len(self.state.ids) >= self.sequence.max_new_tokens:
            reason = "length"
        return TokenChunk((drawn.id,), (drawn.logprob,) if drawn.logprob else (), reason)


class PromptPass:
    """Prompts of similar length, read together, a chunk of columns a call. All end at the last column.

    One with ``media`` is read alone: its prompt in one pass, what was answered after it in chunks again. So a token
    for images that the model itself wrote is no image, here as when it was drawn."""

    def __init__(self, prompts: Rows[Prompt], layers: int, chunk_tokens: int, media: MediaInputs | None = None) -> None:
        assert media is None or len(prompts) == 1
        self._media = media
        self._adapters = [adapter for _, adapter in prompts]
        self._columns = max(len(ids) for ids, _ in prompts)
        padding = [self._columns - len(ids) for ids, _ in prompts]
        self._ids = torch.tensor([[0] * pad + list(ids) for pad, (ids, _) in zip(padding, prompts, strict=True)])
        self._step = max(8, chunk_tokens // len(prompts))
        self.cache = BatchCache(layers, [-pad for pad in padding])

    def run(self, forward: Forward) -> torch.Tensor | None:
        """Read the next chunk. After the last one: what ``forward`` gave for the last column."""
        done = self.cache.window.length
        media = self._media if done == 0 else None
        columns = min(self._step if media is None else media.tokens, self._columns - done)
        self.cache.make_room(self._columns - done)
        mask, positions = self.cache.padding_mask(columns), self.cache.positions(columns)
        ids = self._ids[:, done : done + columns]
        if media is None:
            out = forward(ids, mask, positions, self.cache, self._adapters)
        else:
            own = positions if media.positions is None else media.positions
            out = forward(ids, mask, own, self.cache, self._adapters, media.inputs)
            self.cache.offsets = [media.offset]
        self.cache.advance(columns)
        return out if done + columns == self._columns else None


class Prefill:
    """Sequences on their way into a batch. Equal prompts (n choices) are read once."""

    def __init__(self, rows: list[Row], model: Model, chunk_tokens: int) -> None:
        self.rows = rows
        self._model = model
        distinct = {row.prompt_key: row for row in rows}
        keys = list(distinct)
        self._places = {id(row): keys.index(row.prompt_key) for row in rows}
        prompts = [(row.prefix, row.sequence.adapter) for row in distinct.values()]
        self._pass = PromptPass(prompts, model.layers, chunk_tokens, rows[0].media)

    @property
    def cache(self) -> BatchCache:
        return self._pass.cache

    def read(self) -> torch.Tensor | None:
        """Read the next chunk. After the last one: the logits after each distinct prompt."""
        return self._pass.run(self._model.forward)

    def run(self) -> list[Drawn] | None:
        """Read the next chunk. After the last one: the first token of each of ``rows``."""
        logits = self.read()
        if logits is None:
            return None
        sampler = BatchSampler([row.state for row in self.rows], self._model.vocab_size, logits.device)
        return sampler(logits[[self.place(row) for row in self.rows]])

    def place(self, row: Row) -> int:
        """The row of ``cache`` that is ``row``'s prompt."""
        return self._places[id(row)]


def prefill_groups(rows: list[Row], key: Callable[[Row], object], model: Model, chunk_tokens: int) -> list[Prefill]:
    """``rows`` in prefills of equal keys and similar lengths, none larger than a chunk unless one prompt alone is."""
    groups: list[tuple[object, set[object], list[Row]]] = []
    for row in sorted(rows, key=lambda row: len(row.prefix)):
        prompt, own_key = row.prompt_key, key(row)
        if groups:
            last_key, prompts, members = groups[-1]
            length, shortest = len(row.prefix), len(members[0].prefix)
            fits = length <= shortest * _PADDING_ALLOWED + 8 and (len(prompts) + 1) * length <= chunk_tokens
            fits = fits and row.media is None and members[0].media is None
            if own_key == last_key and (fits or prompt in prompts):
                prompts.add(prompt)
                members.append(row)
                continue
        groups.append((own_key, {prompt}, [row]))
    return [Prefill(members, model, chunk_tokens) for _, _, members in groups]


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
