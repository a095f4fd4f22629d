"""What vLLM's own sampling lacks, as its logits processors; they run in the engine core's process.

A request says what it needs in ``SamplingParams.extra_args["tokenfleet"]`` (`params.Extras`); those that need nothing
cost a dictionary look-up when they join the batch. For the V1 model runner: V2's processors are another interface.
A processor that reads output ids makes vLLM wait for the step before; `compat.want_output_ids_only_if_needed` lets it
do so only while a request of the batch needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tokenfleet.engines.grammar import GrammarCompiler, TokenGrammar
from tokenfleet.engines.vllm_engine import compat
from tokenfleet.engines.vllm_engine.lifeline import leave_with_parent
from tokenfleet.wire.chat import ResponseFormat

EXTRAS = "tokenfleet"

if not compat.is_front_end:
    # vLLM's configuration names the classes below, so each of its processes imports this before anything else of ours.
    leave_with_parent()
    compat.want_output_ids_only_if_needed()


def _extras(params: SamplingParams) -> Mapping[str, Any]:
    found = (params.extra_args or {}).get(EXTRAS)
    return found if isinstance(found, dict) else {}


@dataclass(slots=True)
class _History:
    """``output_ids`` is the runner's own growing list of this request's new ids."""

    output_ids: list[int]
    barred: list[int] = field(default_factory=list)
    barred_until: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt_ids: list[int] = field(default_factory=list)
    """All ids that were there before this attempt."""
    delivered: Counter[int] = field(default_factory=Counter)


class HistoryProcessor(LogitsProcessor):
    """Penalties that count the ids delivered by earlier attempts, and stop ids barred until min_tokens are out.

    vLLM counts presence and frequency over the request's own new ids, and takes EOS for a stop id even where a
    request ignores it."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _History] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    @property
    def reads_output_ids(self) -> bool:
        return bool(self._rows)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _history)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, history in self._rows.items():
            _apply_history(logits[row], history)
        return logits


def _history(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _History | None:
    extras = _extras(params)
    if "barred" not in extras and "delivered" not in extras:
        return None
    history = _History(output_ids, extras.get("barred", []), extras.get("barred_until", 0))
    if "delivered" in extras:
        history.repetition = extras["repetition"]
        history.presence, history.frequency = extras["presence"], extras["frequency"]
        history.prompt_ids = prompt_ids or []
        count = extras["delivered"]
        history.delivered = Counter(history.prompt_ids[len(history.prompt_ids) - count :] if count else ())
    return history


def _apply_history(scores: torch.Tensor, history: _History) -> None:
    """Change one row ``[vocab]`` in place: repetition, then frequency and presence, then bars, as everywhere."""
    if history.repetition != 1:
        seen = torch.tensor(sorted({*history.prompt_ids, *history.output_ids}), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / history.repetition, values * history.repetition)
    if history.presence or history.frequency:
        counts = history.delivered + Counter(history.output_ids)
        if counts:
            ids = torch.tensor(list(counts), device=scores.device)
            amounts = [history.presence + count * history.frequency for count in counts.values()]
            scores[ids] -= torch.tensor(amounts, dtype=scores.dtype, device=scores.device)
    if history.barred and len(history.output_ids) < history.barred_until:
        barred = scores.clone()
        barred[history.barred] = -torch.inf
        if bool((barred > -torch.inf).any()):  # else a grammar is at its end, and nothing but the end may come
            scores.copy_(barred)


@dataclass(slots=True)
class _Guide:
    grammar: TokenGrammar
    output_ids: list[int]
    read: int = 0
    """How many of ``output_ids`` the grammar has read."""


class GrammarProcessor(LogitsProcessor):
    """Holds an answer that goes on after a takeover to its grammar, which reads the delivered ids first.

    vLLM's own structured output begins a grammar anew with each request; it does all the others."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._config = vllm_config.model_config
        self._device = device
        self._compiler: GrammarCompiler | None = None
        self._rows: dict[int, _Guide] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    @property
    def reads_output_ids(self) -> bool:
        return bool(self._rows)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._guide)

    def _guide(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Guide | None:
        extras = _extras(params)
        if "response_format" not in extras:
            return None
        if self._compiler is None:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self._config.tokenizer, trust_remote_code=self._config.trust_remote_code
            )
            self._compiler = GrammarCompiler(tokenizer, self._config.get_vocab_size())
        before = (prompt_ids or [])[-extras["delivered"] :]
        wanted = ResponseFormat.model_validate(extras["response_format"])
        # An error here would end the engine core; the engine has done the same with the same ids (`engine._prime`).
        grammar = self._compiler.compile(wanted, tuple(before), frozenset(params.stop_token_ids or ()))
        return _Guide(grammar, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, guide in self._rows.items():
            for token in guide.output_ids[guide.read :]:
                guide.grammar.accept(token)  # it was allowed by the mask of its step
            guide.read = len(guide.output_ids)
            logits[row].masked_fill_(~guide.grammar.mask()[: logits.shape[-1]].to(self._device), -torch.inf)
        return logits


@dataclass(frozen=True, slots=True)
class _Cut:
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class CutProcessor(LogitsProcessor):
    """Temperatures outside of vLLM's 0.01 to 2, and min_p beside top_p: vLLM takes top_p of what min_p left over,
    transformers and we take both of the same distribution. Such a request's cuts are all made here."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Cut] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _cut)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, cut in self._rows.items():
            _apply_cut(logits[row], cut)
        return logits


def _cut(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Cut | None:
    cut = _extras(params).get("cut")
    return None if cut is None else _Cut(*cut)


def _apply_cut(scores: torch.Tensor, cut: _Cut) -> None:
    """Change one row ``[vocab]`` in place, so that softmax gives the distribution to draw from."""
    scores.sub_(scores.max()).div_(cut.temperature)
    probs = torch.softmax(scores, dim=-1)
    ordered, order = probs.sort(descending=True)
    keep = ordered >= cut.min_p * ordered[0]
    if cut.top_k > 0:
        keep[cut.top_k :] = False
        ordered = ordered / ordered[: cut.top_k].sum()
    if cut.top_p < 1:
        keep &= ordered.cumsum(0) - ordered < cut.top_p
    keep[0] = True
    scores[order[~keep]] = -torch.inf
