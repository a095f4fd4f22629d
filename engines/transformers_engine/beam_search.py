"""The search itself: which beams go on and which are done, as `transformers.generate(num_beams=k)` decides it.

Scores are sums of log probabilities (after penalties, bars and grammars; after temperature and cuts, where a search
samples). A finished text's is divided by its length to the power of ``length_penalty``. The search ends when no running
beam can beat the worst of k finished ones, judged by its present length (``early_stopping=False`` there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tokenfleet.engines.base import RawLogprob, TokenChunk
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import EngineError

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One token of a beam, linked to the one before it."""

    before: Node | None
    token: int
    logprob: RawLogprob | None

    def path(self) -> list[Node]:
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.before
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class Step:
    """Beam i goes on from beam ``parents[i]`` with ``tokens[i]``."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    def __init__(self, params: GenerationParams, seed: int, stop_ids: frozenset[int], max_new_tokens: int) -> None:
        self.width = params.num_beams
        self.length = 0
        """Tokens that each running beam has."""
        self._params = params
        self._seed = seed
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens
        # Enough that the beams can go on even if all of the best candidates end.
        self._kept = max(2, 1 + len(stop_ids)) * self.width
        self._beams: list[Node | None] = [None] * self.width
        # They begin as one: else all would take the same tokens.
        self._scores = [0.0] + [-1e9] * (self.width - 1)
        self._finished: list[tuple[float, Node]] = []

    def step(self, scores: torch.Tensor, logprob: Callable[[int, int], RawLogprob] | None = None) -> Step | None:
        """Take one token for all beams out of ``scores`` ``[width, vocab]`` (log probabilities, float32).

        ``logprob`` tells of a beam's token. None: the search is over. Raises `EngineError` for want of any choice."""
        vocab = scores.shape[-1]
        total = self._warped(scores) if not self._params.is_greedy else scores
        total = (total + torch.tensor(self._scores, device=scores.device)[:, None]).reshape(-1)
        values, places = self._best(total, min(self._kept, total.numel()))
        if not values or math.isnan(values[0]):
            raise EngineError("The model gave no usable output for this request.")
        self.length += 1
        going_on: list[tuple[float, int, Node]] = []
        for rank, (value, place) in enumerate(zip(values, places, strict=True)):
            parent, token = divmod(place, vocab)
            is_end = token in self._stop_ids or self.length >= self._max_new_tokens
            if is_end and rank >= self.width:
                continue
            node = Node(self._beams[parent], token, logprob(parent, token) if logprob else None)
            if is_end:
                self._finish(value / self._weight, node)
            else:
                going_on.append((value, parent, node))
        going_on.sort(key=lambda candidate: -candidate[0])  # drawn ones come in the order of the draw
        if not going_on or not self._can_improve(going_on[0][0]):
            return None
        # Fewer candidates than beams (a tiny vocabulary, or nearly all is barred): the rest have no say.
        going_on += [(-1e9, *going_on[0][1:])] * (self.width - len(going_on))
        del going_on[self.width :]
        self._scores = [value for value, _, _ in going_on]
        self._beams = [node for _, _, node in going_on]
        return Step([parent for _, parent, _ in going_on], [node.token for _, _, node in going_on])

    @property
    def _weight(self) -> float:
        return float(self.length**self._params.length_penalty)

    def _finish(self, score: float, node: Node) -> None:
        self._finished.append((score, node))
        self._finished.sort(key=lambda pair: -pair[0])
        del self._finished[self.width :]

    def _can_improve(self, best: float) -> bool:
        if len(self._finished) < self.width:
            return True
        return best / self._weight > self._finished[-1][0]

    def tokens_of(self, beam: int) -> list[int]:
        node = self._beams[beam]
        return [each.token for each in node.path()] if node else []

    def result(self, rank: int) -> TokenChunk:
        """The text with the ``rank``-th best score (0 is the best), whole."""
        finished = self._finished[min(rank, len(self._finished) - 1)][1].path()
        reason: Literal["stop", "length"] = "stop" if finished[-1].token in self._stop_ids else "length"
        logprobs = tuple(node.logprob for node in finished if node.logprob is not None)
        return TokenChunk(tuple(node.token for node in finished), logprobs, reason)

    def _best(self, total: torch.Tensor, count: int) -> tuple[list[float], list[int]]:
        """The best candidates, or ``count`` drawn without replacement, by the Gumbel-max trick: in both, best first."""
        if self._params.is_greedy:
            values, places = total.topk(count)
        else:
            generator = torch.Generator().manual_seed((self._seed * 31 + self.length * _GOLDEN) & (2**63 - 1))
            noise = torch.empty(total.shape, dtype=torch.float64).exponential_(generator=generator).log_().neg_()
            places = (total.double() + noise.to(total.device)).topk(count).indices
            values = total[places]
        alive = values != -torch.inf
        return values[alive].tolist(), places[alive].tolist()

    def _warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Temperature, top_k, top_p and min_p; each cut leaves so many that beams can go on beside all that end."""
        params, least = self._params, max(2, 1 + len(self._stop_ids))
        scores = scores / params.temperature
        ordered, ids = scores.sort(dim=-1, descending=True)
        rank = torch.arange(ordered.shape[-1], device=scores.device)
        if params.top_k > 0:
            ordered = ordered.masked_fill(rank >= max(params.top_k, least), -torch.inf)
        if params.top_p < 1:
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            ordered = ordered.masked_fill((before >= params.top_p) & (rank >= least), -torch.inf)
        if params.min_p > 0:
            probabilities = ordered.softmax(-1)
            weak = probabilities < params.min_p * probabilities[:, :1]
            ordered = ordered.masked_fill(weak & (rank >= least), -torch.inf)
        return torch.empty_like(scores).scatter_(-1, ids, ordered)
