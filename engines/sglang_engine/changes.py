"""What changes the scores of a batch before a token is chosen: biases, penalties, barred ids, grammars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenfleet.engines.sglang_engine.grammars import Grammars
from tokenfleet.engines.sglang_engine.history import PENALTIES, History
from tokenfleet.engines.sglang_engine.tensors import columns, placed

CHANGES = frozenset({"bias_ids", "barred", "grammar", *PENALTIES})
"""A row without any of these keeps its scores."""


class Changes:
    """Of a batch with a row that has one of `CHANGES`. ``rows``: a mapping for each, empty for SGLang's own."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        numbered = list(enumerate(rows))
        whole = columns(rows, {"prompt": 0, "delivered": 0}, torch.int64, device)
        self._prompts, self._least = whole.split(1, dim=1)
        self._bias = self._scatter([(p, i, v) for p, row in numbered for i, v in _pairs(row)])
        barred = [(p, i, row["min_tokens"]) for p, row in numbered if "barred" in row for i in row["barred"]]
        self._barred = self._scatter(barred)
        self._history = History(rows, vocab_size, device)
        self._grammars = Grammars(rows, vocab_size, device)

    def record(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """See `sampler.Batch.record`."""
        if self._history.is_needed or self._grammars.is_needed:
            is_new = positions.long() + 1 - self._prompts[:, 0] >= self._least[:, 0]
            self._history.record(ids, is_new)
            self._grammars.record(ids, is_new)

    def scores(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``raw`` after bias, penalties, bars and grammars: what greedy maximises."""
        scores = raw.to(torch.float32, copy=True)
        if self._bias is not None:
            rows, ids, values = self._bias
            scores.index_put_((rows, ids), values, accumulate=True)
        self._history.apply(scores)
        unbarred = scores
        if self._barred is not None:
            rows, ids, least = self._barred
            index = positions.long() + 1 - self._prompts[:, 0]  # of the token to come, in its choice
            if self._grammars.is_needed:
                unbarred = scores.clone()
            scores[rows, ids] = torch.where(index[rows] < least, -torch.inf, scores[rows, ids])
        self._grammars.apply(scores, unbarred)
        return scores

    def _scatter(self, entries: list[tuple[int, int, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        entries = [entry for entry in entries if entry[1] < self._vocab_size]
        if not entries:
            return None
        rows, ids, values = zip(*entries, strict=True)
        place = torch.int64, self._device
        return placed(rows, *place), placed(ids, *place), placed(values, torch.float32, self._device)


def _pairs(row: Mapping[str, Any]) -> Any:
    return zip(row.get("bias_ids", ()), row.get("bias", ()), strict=True)
