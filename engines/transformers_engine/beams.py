"""A beam search in the engine: a batch of its own, whose rows trade caches after every step.

The choices of one job share a search: the best text is choice 0's, the next one choice 1's. Nothing is told before the
end, since until then another beam may win; so a search that loses its worker begins anew, and comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tokenfleet.engines.base import RawLogprob, TokenChunk
from tokenfleet.engines.grammar import TokenGrammar
from tokenfleet.engines.transformers_engine.batch import Model, Prefill, Row
from tokenfleet.engines.transformers_engine.beam_search import BeamSearch, Step
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.sampling import BatchSampler, SamplingState
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ContextLengthExceeded, InvalidRequest


@dataclass(slots=True, eq=False)
class SearchRow(Row):
    """A search on its way through the engine. ``ranks``: who gets which of its texts; ``stream`` is one of them."""

    ranks: dict[object, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.state.params.num_beams

    @property
    def is_alone(self) -> bool:
        return True

    @property
    def streams(self) -> tuple[object, ...]:
        return tuple(self.ranks)

    @property
    def job(self) -> str:
        """The job and attempt whose choices may share this search; "" for a sequence that belongs to none."""
        return self.sequence.sequence_id.rpartition("-")[0]

    def leave(self, receivers: set[object]) -> bool:
        for receiver in receivers & self.ranks.keys():
            del self.ranks[receiver]
        return not self.ranks


class SearchBatch:
    """To the loop a batch with one row, which gives nothing until it is over."""

    def __init__(self, row: SearchRow, prefill: Prefill, logits: torch.Tensor, model: Model) -> None:
        """``logits`` ``[1, vocab]`` are those after the prompt."""
        self.rows: list[Row] = [row]
        self._row = row
        self._model = model
        width, state = row.width, row.state
        self._search = BeamSearch(state.params, state.seed, state.stop_ids, row.sequence.max_new_tokens)
        self._cache = BatchCache(model.layers)
        self._cache.join(prefill.cache, [prefill.place(row)] * width)
        self._grammars = [_fork(state.grammar) for _ in range(width)]
        self._tokens: list[int] = []
        self._step = self._choose(logits.expand(width, -1))

    @property
    def held_tokens(self) -> int:
        return self._cache.held_tokens

    def leave(self, row: Row) -> None:
        self.rows.clear()

    def decode(self) -> dict[object, TokenChunk] | None:
        """One token for every beam; once the search is over, what each receiver gets."""
        if self._step is not None:
            ids, width = torch.tensor(self._step.tokens)[:, None], self._row.width
            self._cache.make_room(1)
            mask, positions = self._cache.padding_mask(1), self._cache.positions(1)
            logits = self._model.forward(ids, mask, positions, self._cache, [self._row.sequence.adapter] * width)
            self._cache.advance(1)
            self._step = self._choose(logits)
        if self._step is not None:
            return None
        return {stream: self._search.result(rank) for stream, rank in self._row.ranks.items()}

    def _choose(self, logits: torch.Tensor) -> Step | None:
        raw = logits.float().log_softmax(-1)
        state, delivered = self._row.state, self._row.state.ids
        states = [
            SamplingState(
                state.params, state.seed, state.prompt_ids, [*delivered, *self._search.tokens_of(beam)],
                state.stop_ids, self._grammars[beam],
            )
            for beam in range(self._row.width)
        ]  # fmt: skip
        scores = BatchSampler(states, self._model.vocab_size, raw.device).scores(raw)
        step = self._search.step(scores, self._logprobs(raw) if state.params.logprobs else None)
        if step is None:
            return None
        if step.parents != list(range(self._row.width)):
            self._cache.reorder(step.parents)
        if state.grammar is not None:
            self._grammars = [_fork(self._grammars[parent]) for parent in step.parents]
            for grammar, token in zip(self._grammars, step.tokens, strict=True):
                assert grammar is not None
                grammar.accept(token)
        return step

    def _logprobs(self, raw: torch.Tensor) -> Callable[[int, int], RawLogprob]:
        """What to tell of a token of a beam."""
        values, ids = raw.topk(min(self._row.state.params.top_logprobs, raw.shape[-1]), dim=-1)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
        return lambda beam, token: RawLogprob(token, float(raw[beam, token]), tops[beam])


def _fork(grammar: object) -> TokenGrammar | None:
    return grammar.fork() if isinstance(grammar, TokenGrammar) else None


def check_search(params: GenerationParams, tokens: int, slots: int, budget_tokens: int) -> None:
    """Raises `InvalidRequest` for a search that makes no sense, or that there will never be room for.

    ``tokens``: prompt and answer of one beam."""
    width = params.num_beams
    if width == 1:
        if params.length_penalty != 1:
            raise InvalidRequest(
                "length_penalty weighs the texts of a beam search, and num_beams is 1.",
                code="unsupported_parameter",
                hint="Leave length_penalty out, or set num_beams.",
                param="length_penalty",
            )
        return
    if params.n > width:
        hint = "A beam search ends with num_beams texts."
        raise InvalidRequest(f"n={params.n} is more than num_beams={width}.", hint=hint, param="n")
    if width > slots:
        hint = f"Use at most {slots}, or give the worker a larger max_batch_size."
        raise InvalidRequest(
            f"num_beams={width} is more than the {slots} slots there are.", hint=hint, param="num_beams"
        )
    if BatchCache.tokens_for(width, tokens) > max(budget_tokens, BatchCache.tokens_for(1, tokens)):
        raise ContextLengthExceeded(
            f"{width} beams of {tokens} tokens are more than the {budget_tokens} tokens there is memory for.",
            hint="Use fewer beams, or fewer tokens.",
            context_tokens=budget_tokens // width,
        )
