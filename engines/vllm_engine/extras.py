"""What vLLM's own sampling lacks, for one row of logits; `processors` and `sampler_v2` bring it into its two runners.

A request says what it needs in ``SamplingParams.extra_args["tokenfleet"]`` (`params`). Runs in the engine core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams

from tokenfleet.engines.grammar import GrammarCompiler, TokenGrammar
from tokenfleet.wire.chat import ResponseFormat

EXTRAS = "tokenfleet"


def extras_of(params: SamplingParams) -> Mapping[str, Any]:
    found = (params.extra_args or {}).get(EXTRAS)
    return found if isinstance(found, dict) else {}


@dataclass(slots=True)
class History:
    """Penalties that count the ids delivered by earlier attempts, stop ids barred until min_tokens are out, and more
    biases than vLLM has room for.

    vLLM counts presence and frequency over the request's own new ids, and takes EOS for a stop id even where a
    request ignores it."""

    barred: list[int] = field(default_factory=list)
    barred_until: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt_ids: list[int] = field(default_factory=list)
    """All ids that were there before this attempt."""
    delivered: Counter[int] = field(default_factory=Counter)
    bias_ids: list[int] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: list[int]) -> History | None:
        extras = extras_of(params)
        if not extras.keys() & {"barred", "repetition", "bias"}:
            return None
        history = cls(extras.get("barred", []), extras.get("barred_until", 0))
        history.bias_ids, history.bias = extras.get("bias_ids", []), extras.get("bias", [])
        if "repetition" in extras:
            history.repetition = extras["repetition"]
            history.presence, history.frequency = extras["presence"], extras["frequency"]
            history.prompt_ids = prompt_ids
            history.delivered = Counter(prompt_ids[len(prompt_ids) - extras["delivered"] :])
        return history

    def apply(self, scores: torch.Tensor, output_ids: Sequence[int]) -> None:
        """Change one row ``[vocab]`` in place: biases, repetition, frequency and presence, then bars, as everywhere."""
        if self.bias:
            biases = torch.tensor(self.bias, dtype=scores.dtype, device=scores.device)
            scores[torch.tensor(self.bias_ids, device=scores.device)] += biases
        if self.repetition != 1:
            seen = torch.tensor(sorted({*self.prompt_ids, *output_ids}), device=scores.device)
            values = scores[seen]
            scores[seen] = torch.where(values > 0, values / self.repetition, values * self.repetition)
        if self.presence or self.frequency:
            counts = self.delivered + Counter(output_ids)
            if counts:
                ids = torch.tensor(list(counts), device=scores.device)
                amounts = [self.presence + count * self.frequency for count in counts.values()]
                scores[ids] -= torch.tensor(amounts, dtype=scores.dtype, device=scores.device)
        if self.barred and len(output_ids) < self.barred_until:
            barred = scores.clone()
            barred[self.barred] = -torch.inf
            if bool((barred > -torch.inf).any()):  # else a grammar is at its end, and nothing but the end may come
                scores.copy_(barred)


@dataclass(slots=True)
class Guide:
    """Holds an answer to its grammar, which has read the delivered ids.

    vLLM's own structured output does that for most; see `params` for the others."""

    grammar: TokenGrammar
    read: int = 0
    """How many of the output ids the grammar has read."""

    def apply(self, scores: torch.Tensor, output_ids: Sequence[int]) -> None:
        for token in output_ids[self.read :]:
            self.grammar.accept(token)  # it was allowed by the mask of its step
        self.read = len(output_ids)
        mask = self.grammar.mask()[: scores.shape[-1]].to(scores.device)
        scores.masked_fill_(~mask, -torch.inf)


class Guides:
    """Makes a `Guide` for each request that needs one, with one tokenizer for all."""

    def __init__(self) -> None:
        self._compiler: GrammarCompiler | None = None

    def of(self, params: SamplingParams, prompt_ids: list[int]) -> Guide | None:
        extras = extras_of(params)
        if "response_format" not in extras:
            return None
        if self._compiler is None:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(
                extras["tokenizer"], trust_remote_code=extras["trust_remote_code"]
            )
            self._compiler = GrammarCompiler(tokenizer, extras["vocab_size"])
        wanted = ResponseFormat.model_validate(extras["response_format"])
        before = tuple(prompt_ids[len(prompt_ids) - extras["delivered"] :])
        # An error here would end the engine core; the engine has done the same with the same ids (`engine._prime`).
        return Guide(self._compiler.compile(wanted, before, frozenset(params.stop_token_ids or ())))


@dataclass(frozen=True, slots=True)
class Cut:
    """Temperatures outside of vLLM's 0.01 to 2, and min_p beside top_p: vLLM takes top_p of what min_p left over,
    transformers and we take both of the same distribution. Such a request's cuts are all made here."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> Cut | None:
        cut = extras_of(params).get("cut")
        return None if cut is None else cls(*cut)

    def apply(self, row: torch.Tensor) -> None:
        """Change one row ``[vocab]`` in place, so that softmax gives the distribution to draw from."""
        scores = row.float()
        scores = (scores - scores.max()) / self.temperature
        ordered, order = torch.softmax(scores, dim=-1).sort(descending=True)
        keep = ordered >= self.min_p * ordered[0]
        if self.top_k > 0:
            keep[self.top_k :] = False
            ordered = ordered / ordered[: self.top_k].sum()
        if self.top_p < 1:
            keep &= ordered.cumsum(0) - ordered < self.top_p
        keep[0] = True
        scores[order[~keep]] = -torch.inf
        row.copy_(scores)
