"""Choosing tokens with torch's operations: on a CPU, where each is as quick as its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenfleet.engines.sglang_engine.tensors import columns, placed
from tokenfleet.engines.sglang_engine.uniform import streams, uniform

_BLOCK = 128
"""Divides nearly all vocabularies."""


class TorchDraw:
    """Called with ``scores`` ``[rows, vocab]`` and ``positions`` ``[rows]``, those of the tokens that the scores
    follow, gives token ids ``[rows]``. ``rows``: one of `sampler.Batch.rows` for each."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        sampled = [place for place, row in enumerate(rows) if "seed" in row]
        has_top_k = {place for place in sampled if 0 < rows[place]["top_k"] < vocab_size}
        has_cut = {place for place in sampled if rows[place]["top_p"] < 1 or rows[place]["min_p"] > 0}
        self._most_top_k = max((rows[place]["top_k"] for place in has_top_k), default=0)
        self._draws = [
            (draw, None if len(places) == len(rows) else placed(places, torch.int64, device))
            for draw, places in (
                (self._draw_top_k, [place for place in sampled if place in has_top_k]),
                (self._draw_nucleus, [place for place in sampled if place in has_cut - has_top_k]),
                (self._draw_free, [place for place in sampled if place not in has_cut | has_top_k]),
            )
            if places
        ]
        cuts = columns(rows, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}, torch.float32, device)
        self._temperature, self._top_p, self._min_p = cuts.split(1, dim=1)
        whole = columns(rows, {"top_k": 0, "seed": 0, "prompt": 0}, torch.int64, device)
        self._top_k, keys, self._prompts = whole.split(1, dim=1)
        self._streams = streams(keys)

    def __call__(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        numbers = uniform(self._streams, positions.long()[:, None] + 1 - self._prompts) if self._draws else None
        if self._draws and self._draws[0][1] is None:
            return self._draws[0][0](scores, slice(None), numbers)
        ids = scores.argmax(dim=-1)
        for draw, places in self._draws:
            ids[places] = draw(scores[places], places, numbers[places] if numbers is not None else None)
        return ids

    def _draw_top_k(self, scores: torch.Tensor, rows: Any, numbers: Any) -> torch.Tensor:
        top_k = self._top_k[rows]
        values, ids = scores.topk(self._most_top_k, dim=-1)
        values = values.masked_fill(torch.arange(values.shape[-1], device=values.device) >= top_k, -torch.inf)
        probabilities = torch.softmax((values - values[:, :1]) / self._temperature[rows], dim=-1)
        return self._pick(self._cut(probabilities, rows), ids, numbers)

    def _draw_nucleus(self, scores: torch.Tensor, rows: Any, numbers: Any) -> torch.Tensor:
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / self._temperature[rows]
        probabilities, ids = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True)
        return self._pick(self._cut(probabilities, rows), ids, numbers)

    def _draw_free(self, scores: torch.Tensor, rows: Any, numbers: Any) -> torch.Tensor:
        weights = (scores - scores.amax(dim=-1, keepdim=True)).div_(self._temperature[rows]).exp_()
        return inverse(weights, numbers)

    def _cut(self, probabilities: torch.Tensor, rows: Any) -> torch.Tensor:
        """Zero what top_p and min_p exclude; ``probabilities`` are in descending order."""
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = (before < self._top_p[rows]) & (probabilities >= self._min_p[rows] * probabilities[:, :1])
        kept[:, 0] = True
        return probabilities * kept

    def _pick(self, probabilities: torch.Tensor, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        # In the order of ids: sorted by probability, two near-equal candidates that swap places because another
        # batch rounded differently would change the outcome.
        ids, order = ids.sort(dim=-1)
        place = inverse(probabilities.gather(-1, order), numbers)
        return ids.gather(-1, place[:, None])[:, 0]


def inverse(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``[rows]``: the place in each row of ``weights`` ``[rows, width]`` where its number ``[rows, 1]`` falls,
    if each place has a share of [0, 1) as large as its weight. Never a place of no weight, unless all are."""
    rows, width = weights.shape
    if width <= 2 * _BLOCK:
        sums = weights.double().cumsum(dim=-1)
        return _place(sums, numbers * sums[:, -1:])[:, 0]
    # First the block of places, then the place in it: sums over a whole vocabulary are the costliest step of a draw.
    if width % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -width % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    sums = torch.nn.functional.pad(blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), (1, 0))
    target = numbers * sums[:, -1:]
    block = _place(sums[:, 1:], target)
    within = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(dim=-1)
    return (block * _BLOCK + _place(within, target - sums.gather(1, block)))[:, 0]


def _place(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``[rows, 1]``: the first place whose sum is above ``target``, or the first that has all of it."""
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(sums.contiguous(), torch.minimum(target, below), right=True).clamp_(
        max=sums.shape[-1] - 1
    )
