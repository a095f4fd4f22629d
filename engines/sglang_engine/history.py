"""Penalties: which ids a row has had, kept beside the logits, since SGLang's own record lags a step behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenfleet.engines.sglang_engine.tensors import placed

_STATE = "tokenfleet_history"

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What leaves the scores as they are."""


class History:
    """Counts of the ids of those rows that have a penalty. Each row's counts live on with its request: when the batch
    changes, the new batch's are stacked from them."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        places = [place for place, row in enumerate(rows) if any(name in row for name in PENALTIES)]
        self.is_needed = bool(places)
        if not places:
            return
        self._places = placed(places, torch.int64, device)
        values = [[rows[place].get(name, value) for name, value in PENALTIES.items()] for place in places]
        self._repetition, self._presence, self._frequency = placed(values, torch.float32, device).split(1, dim=1)
        states = [_counts(rows[place], vocab_size, device) for place in places]
        self._prompt = torch.stack([prompt for prompt, _ in states])
        self._own = torch.stack([own for _, own in states])
        for place, prompt, own in zip(places, self._prompt, self._own, strict=True):
            request = rows[place]["request"]
            setattr(request, _STATE, (request.retraction_count, prompt, own))

    def apply(self, scores: torch.Tensor) -> None:
        """Change ``scores`` ``[rows, vocab]`` in place: repetition, then presence and frequency."""
        if not self.is_needed:
            return
        own, values = self._own, scores[self._places]
        repeated = torch.where(values < 0, values * self._repetition, values / self._repetition)
        values = torch.where((self._prompt + own) > 0, repeated, values)
        scores[self._places] = values - own * self._frequency - (own > 0) * self._presence

    def record(self, ids: torch.Tensor, is_new: torch.Tensor) -> None:
        """Count ``ids`` ``[rows]`` where ``is_new``."""
        if self.is_needed:
            self._own.scatter_add_(1, ids[self._places, None].long(), is_new[self._places, None].float())


def _counts(row: Mapping[str, Any], vocab_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts ``[vocab]`` of the prompt's ids and of the choice's own, delivered ones included."""
    request = row["request"]
    retractions, prompt, own = getattr(request, _STATE, (None, None, None))
    if retractions == request.retraction_count and prompt is not None and own is not None:
        return prompt, own
    # Before ids of media's contents took the place of the model's own token for them.
    ids = [*request.origin_input_ids_unpadded, *request.output_ids]
    start = row["prompt"]
    return _count(ids[:start], vocab_size, device), _count(ids[start:], vocab_size, device)


def _count(ids: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    known = placed([token for token in ids if 0 <= token < vocab_size], torch.int64, device)
    counts = torch.zeros(vocab_size, device=device)
    return counts.scatter_add_(0, known, torch.ones_like(known, dtype=torch.float32))
