"""The scripted engine's "model": at each place one of 64 fixed rows of logits over the words, chosen by prompt and
index; and plain sampling from it, every core parameter honoured.

Tokens follow from (prompt, seed, index), so a continuation is exact whatever the parameters, and greedy costs one hash.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate

from tokenfleet.engines.base import RawLogprob
from tokenfleet.engines.scripted.hashing import mix, uniform
from tokenfleet.engines.scripted.tokenizer import WORD_IDS
from tokenfleet.wire.chat import GenerationParams

ROWS = 64
UNLIKELY = -20.0
"""Logit of every token that is no word: out of reach, but a bias of +100 gets it."""
CERTAIN = 40.0
"""Logit of the token a script asks for (`[[say: ...]]`, ``eos_after``)."""

_LOGITS = tuple(
    {token_id: 5.0 * uniform(row, token_id) - 2.0 for token_id in WORD_IDS} for row in range(ROWS)
)  # in [-2, 3): both signs, so that a repetition penalty shows in both its forms
_BEST = tuple(max(row, key=row.__getitem__) for row in _LOGITS)


def row_at(prompt: int, index: int) -> int:
    """Which row holds at ``index`` after the prompt with this digest."""
    return mix(prompt ^ (index * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)) % ROWS


def best_at(prompt: int, index: int) -> int:
    """The token that greedy takes when no bias and no penalty moves it."""
    return _BEST[row_at(prompt, index)]


def logits_at(prompt: int, index: int, forced: int | None = None) -> dict[int, float]:
    """The model's own distribution, unnormalised. Absent ids have `UNLIKELY`."""
    row = dict(_LOGITS[row_at(prompt, index)])
    if forced is not None:
        row[forced] = CERTAIN
    return row


class Sampler:
    """Chooses the tokens of one sequence."""

    __slots__ = ("_counts", "_is_plain", "_params", "_prompt", "_seed", "_seen")

    def __init__(
        self, prompt: int, prompt_ids: Iterable[int], delivered: Iterable[int], params: GenerationParams, seed: int
    ) -> None:
        self._prompt = prompt
        self._params = params
        self._seed = seed
        self._is_plain = not (
            params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self._seen = set() if self._is_plain else set(prompt_ids)
        self._counts: Counter[int] = Counter() if self._is_plain else Counter(delivered)

    def choose(self, index: int, barred: frozenset[int] = frozenset()) -> int:
        """The token at ``index``, none of ``barred``."""
        params = self._params
        if self._is_plain and not barred:
            row = row_at(self._prompt, index)
            if params.is_greedy:
                return _BEST[row]
            ids, cumulative = _row_distribution(row, params.temperature, params.top_k, params.top_p, params.min_p)
        else:
            logits = self._adjusted(index, barred)
            if params.is_greedy:
                return max(logits, key=logits.__getitem__)
            ids, cumulative = distribution(logits, params.temperature, params.top_k, params.top_p, params.min_p)
        place = bisect_right(cumulative, uniform(self._seed, index) * cumulative[-1])
        return ids[min(place, len(ids) - 1)]

    @property
    def is_greedy(self) -> bool:
        """Whether it always takes `best_at`."""
        return self._is_plain and self._params.is_greedy

    def count(self, token_id: int) -> None:
        """Penalties shall know that ``token_id`` was generated."""
        if not self._is_plain:
            self._counts[token_id] += 1

    def _adjusted(self, index: int, barred: frozenset[int]) -> dict[int, float]:
        params = self._params
        logits = logits_at(self._prompt, index)
        for token_id, bias in params.logit_bias.items():
            logits[token_id] = logits.get(token_id, UNLIKELY) + bias
        if params.repetition_penalty != 1.0:
            for token_id in self._seen.union(self._counts) & logits.keys():
                value = logits[token_id]
                logits[token_id] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        for token_id, count in self._counts.items():
            if token_id in logits:
                logits[token_id] -= params.presence_penalty + count * params.frequency_penalty
        for token_id in barred:
            logits.pop(token_id, None)
        return logits

    def logprob(self, index: int, token_id: int, forced: int | None, top: int) -> RawLogprob:
        logits = logits_at(self._prompt, index, forced)
        total = math.log(sum(map(math.exp, logits.values())))
        best = sorted(logits.items(), key=lambda item: -item[1])[:top]
        return RawLogprob(
            token_id, logits.get(token_id, UNLIKELY) - total, tuple((each, value - total) for each, value in best)
        )


def distribution(
    logits: Mapping[int, float], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], list[float]]:
    """Ids, most probable first, and their cumulative weights, after temperature, top-k, top-p and min-p in that order
    (transformers' and vLLM's)."""
    ids = sorted(logits, key=lambda token_id: (-logits[token_id], token_id))
    if top_k > 0:
        ids = ids[:top_k]
    peak = logits[ids[0]]
    weights = [math.exp((logits[token_id] - peak) / temperature) for token_id in ids]
    if top_p < 1:
        enough = top_p * sum(weights)
        kept, mass = 0, 0.0
        while mass < enough and kept < len(weights):
            mass += weights[kept]
            kept += 1
        ids, weights = ids[:kept], weights[:kept]
    if min_p > 0:
        weights = [weight for weight in weights if weight >= min_p]  # the first weighs 1
        ids = ids[: len(weights)]
    return ids, list(accumulate(weights))


@lru_cache(maxsize=64 * ROWS)
def _row_distribution(
    row: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], list[float]]:
    return distribution(_LOGITS[row], temperature, top_k, top_p, min_p)
