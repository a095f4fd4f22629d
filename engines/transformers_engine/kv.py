"""The KV cache of a changing batch: every row ends at the same column.

Rows are padded on the left, as `transformers.generate` pads prompts, so any model that can generate from a padded
batch works unchanged: its own code builds the masks from a 2-D attention mask. A row joins by being written so that
it ends at the current column, and leaves by having the last row moved into its place. New columns are written in
place (transformers' DynamicCache copies all of it at every step: a third of the step's time at 16 rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_COLUMN_BLOCK = 64


class _Window:
    """The part of every layer's buffer that is in use: rows ``[0, rows)``, columns ``[start, stop)``."""

    __slots__ = ("capacity", "row_capacity", "rows", "start", "stop")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.row_capacity = _row_capacity(rows)
        self.capacity = _COLUMN_BLOCK
        self.start = 0
        self.stop = 0

    @property
    def length(self) -> int:
        return self.stop - self.start


class BatchLayer(CacheLayerMixin):
    """One layer's keys and values, ``[row_capacity, heads, capacity, head_dim]``.

    Keeps all tokens, also for sliding-window attention: the model's mask hides what lies outside the window."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        _, heads, _, head_dim = like.shape
        # Zeroed: what is masked is still multiplied by zero, and zero times an old NaN is NaN.
        return like.new_zeros((self.window.row_capacity, heads, self.window.capacity, head_dim))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, end = self.window, self.window.stop + key_states.shape[-2]
        self.keys[: window.rows, :, window.stop : end] = key_states
        self.values[: window.rows, :, window.stop : end] = value_states
        return self.keys[: window.rows, :, window.start : end], self.values[: window.rows, :, window.start : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.length

    def get_max_length(self) -> int:
        return -1

    def relayout(self, old: _Window) -> None:
        """Move what ``old`` describes into a buffer of the present window's shape."""
        if not self.is_initialized:
            return
        self.keys = self._relaid(self.keys, old)
        self.values = self._relaid(self.values, old)

    def _relaid(self, source: torch.Tensor, old: _Window) -> torch.Tensor:
        target = self._buffer(source)
        target[: old.rows, :, self.window.start : self.window.stop] = source[: old.rows, :, old.start : old.stop]
        return target

    def clear(self, columns: int) -> None:
        """Zero the first ``columns`` columns of all rows."""
        if self.is_initialized and columns:
            for buffer in (self.keys, self.values):
                buffer[: self.window.rows, :, self.window.start : self.window.start + columns] = 0

    def take(self, other: BatchLayer, rows: torch.Tensor) -> None:
        """Write ``rows`` of ``other`` behind the present rows, ending at the current column."""
        if not other.is_initialized:
            return  # a layer that uses another layer's keys and values
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
        window, theirs = self.window, other.window
        at, first = slice(window.rows, window.rows + len(rows)), window.stop - theirs.length
        for mine, their in ((self.keys, other.keys), (self.values, other.values)):
            mine[at, :, window.start : first] = 0
            mine[at, :, first : window.stop] = their[rows.to(their.device), :, theirs.start : theirs.stop]

    def move(self, source: int, target: int) -> None:
        if not self.is_initialized:
            return
        window = self.window
        for buffer in (self.keys, self.values):
            buffer[target, :, window.start : window.stop] = buffer[source, :, window.start : window.stop]

    def gather(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        window = self.window
        for buffer in (self.keys, self.values):
            used = buffer[: window.rows, :, window.start : window.stop]
            used.copy_(used[rows.to(buffer.device)])  # the index makes a copy first


class BatchCache(Cache):
    """The cache of one batch. ``lengths`` are the tokens each row holds; a row whose padding is still to be computed
    starts at minus that padding. ``offsets`` are how far each row's next position lies from its length: an image of
    Qwen-VL has many tokens and takes few positions. All bookkeeping is in Python, so nothing waits for a device."""

    def __init__(self, layers: int, lengths: Sequence[int] = ()) -> None:
        self.window = _Window(len(lengths))
        self.lengths = list(lengths)
        self.offsets = [0] * len(lengths)
        super().__init__(layers=[BatchLayer(self.window) for _ in range(layers)])

    @staticmethod
    def tokens_for(rows: int, longest: int) -> int:
        """Tokens there will be memory for once ``rows`` rows are there, the longest with ``longest`` tokens."""
        return _row_capacity(rows) * _capacity(longest)

    @property
    def held_tokens(self) -> int:
        """Tokens there is memory for now, padding and reserve included."""
        return self.window.row_capacity * self.window.capacity

    @property
    def bytes_per_token(self) -> int:
        """Once something has been written."""
        buffers = [buffer for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]
        return int(sum(buffer.numel() * buffer.element_size() for buffer in buffers)) // self.held_tokens

    def make_room(self, columns: int, *, more_rows: int = 0, left: int = 0) -> None:
        """See to it that ``columns`` more columns, and ``left`` free ones before the first, fit for all rows."""
        window = self.window
        rows = window.rows + more_rows
        need = left + window.length + columns
        fits = window.stop + columns <= window.capacity and window.start >= left and rows <= window.row_capacity
        if fits and window.row_capacity <= 4 * rows and window.capacity <= 4 * _capacity(need):
            return
        old = _Window(window.rows)
        old.start, old.stop = window.start, window.stop
        window.capacity, window.row_capacity = _capacity(need), _row_capacity(rows)
        window.start, window.stop = left, left + old.length
        for layer in self.layers:
            layer.relayout(old)

    def advance(self, columns: int) -> None:
        """A forward pass has written ``columns`` columns."""
        self.window.stop += columns
        self.lengths = [length + columns for length in self.lengths]

    def join(self, other: BatchCache, rows: Sequence[int]) -> None:
        """Append ``rows`` of ``other`` (one may be named several times) as the last rows."""
        window = self.window
        missing = max(0, other.window.length - window.length)
        self.make_room(1, more_rows=len(rows), left=missing)
        window.start -= missing
        index = torch.tensor(rows)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.clear(missing)
            mine.take(theirs, index)
        window.rows += len(rows)
        self.lengths += [other.lengths[row] for row in rows]
        self.offsets += [other.offsets[row] for row in rows]

    def drop(self, row: int) -> None:
        """Remove ``row``; the last row takes its place."""
        window = self.window
        last = window.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
            self.offsets[row] = self.offsets[last]
        self.lengths.pop()
        self.offsets.pop()
        window.rows = last
        window.start = window.stop - max(self.lengths, default=0)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was, for all rows."""
        assert len(rows) == self.window.rows
        index = torch.tensor(rows)
        for layer in self.layers:
            layer.gather(index)
        self.lengths = [self.lengths[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]

    def padding_mask(self, columns: int) -> torch.Tensor:
        """``[rows, columns so far and to come]``, 1 where there is a token: generate's ``attention_mask``."""
        total = self.window.length + columns
        padding = torch.tensor([self.window.length - length for length in self.lengths])
        return (torch.arange(total)[None, :] >= padding[:, None]).long()

    def positions(self, columns: int) -> torch.Tensor:
        """``[rows, columns]``: the place of each new token in its own row."""
        first = torch.tensor([length + offset for length, offset in zip(self.lengths, self.offsets, strict=True)])
        return (first[:, None] + torch.arange(columns)[None, :]).clamp_(min=0)


def _capacity(columns: int) -> int:
    # The reserve makes re-laying rare: once in 64 or more steps.
    return -(-(columns + max(_COLUMN_BLOCK, columns // 8)) // _COLUMN_BLOCK) * _COLUMN_BLOCK


def _row_capacity(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()
