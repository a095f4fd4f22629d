"""`extras` in the sampler of vLLM's model runner V2, the faster one and its default for dense models on GPUs.

V2 of 0.26 takes no logits processors, so the stages of its own sampler are wrapped: after the logit bias, where
penalties come, and after the last mask, before its temperature. A step without a request that needs something costs one
look into an array of flags; one with such a request waits for the step before.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenfleet.engines.vllm_engine.extras import Cut, Guide, Guides, History, extras_of


@dataclass(slots=True)
class _Slot:
    needed: list[History | Guide]
    """A grammar comes first: `History` bars nothing that is the only way on."""
    cut: Cut | None


class _Rows:
    """What the requests in a sampler's slots need. ``req_states``: `vllm.v1.worker.gpu.states.RequestState`."""

    def __init__(self, req_states: Any) -> None:
        self._req_states = req_states
        self._guides = Guides()
        self._slots: dict[int, _Slot] = {}
        self._needs = np.zeros(req_states.max_num_reqs, dtype=bool)

    def add(self, slot: int, params: Any, prompt_len: int) -> None:
        """A slot is used again by later requests, so that of an earlier one goes."""
        self._slots.pop(slot, None)
        self._needs[slot] = bool(extras_of(params))
        if self._needs[slot]:
            prompt_ids = self._ids(slot, 0, prompt_len)
            found = (self._guides.of(params, prompt_ids), History.of(params, prompt_ids))
            self._slots[slot] = _Slot([each for each in found if each is not None], Cut.of(params))

    def apply_history(self, logits: Any, slots: Any, pos: Any) -> None:
        """``logits`` ``[requests, vocab]``, ``slots`` and ``pos`` ``[requests]``: the position of the last token."""
        if not self._needs[slots].any():
            return
        for row in np.flatnonzero(self._needs[slots]).tolist():
            slot = int(slots[row])
            needed = self._slots[slot].needed
            if needed:
                start = int(self._req_states.prompt_len.np[slot])
                output_ids = self._ids(slot, start, int(pos[row]) + 1)
                for each in needed:
                    each.apply(logits[row], output_ids)

    def apply_cuts(self, logits: Any, slots: Any) -> None:
        if not self._needs[slots].any():
            return
        for row in np.flatnonzero(self._needs[slots]).tolist():
            cut = self._slots[int(slots[row])].cut
            if cut is not None:
                cut.apply(logits[row])

    def _ids(self, slot: int, start: int, end: int) -> list[int]:
        return list(self._req_states.all_token_ids.gpu[slot, start : max(start, end)].tolist())


def fits() -> bool:
    """Whether this release's sampler has the form that `install` was written for: that of 0.26."""
    try:
        from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
        from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
        from vllm.v1.worker.gpu.sample.sampler import Sampler
    except ImportError:
        return False
    wanted = (
        (Sampler.add_request, ("self", "req_idx", "prompt_len", "sampling_params")),
        (
            LogitBiasState.apply_logit_bias,
            ("self", "logits", "expanded_idx_mapping", "idx_mapping_np", "pos"),
        ),
        (
            BadWordsState.apply_bad_words,
            ("self", "logits", "expanded_idx_mapping", "idx_mapping_np", "input_ids", "expanded_local_pos"),
        ),
    )
    return all(tuple(inspect.signature(method).parameters) == names for method, names in wanted)


def install() -> None:
    """In the engine core: let every V2 sampler made from now on do what `extras` are asked of it."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    init = Sampler.__init__

    def init_with_extras(sampler: Any, *args: Any, **kwargs: Any) -> None:
        init(sampler, *args, **kwargs)
        _extend(sampler, _Rows(sampler.req_states))

    Sampler.__init__ = init_with_extras


def _extend(sampler: Any, rows: _Rows) -> None:
    add_request = sampler.add_request
    apply_bias, apply_words = sampler.logit_bias_state.apply_logit_bias, sampler.bad_words_state.apply_bad_words
    apply_writes = sampler.apply_staged_writes
    added: list[tuple[int, int, Any]] = []

    def add(req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        add_request(req_idx, prompt_len, sampling_params)
        added.append((req_idx, prompt_len, sampling_params))

    def written() -> None:
        """The prompts' ids of new requests are on the device only now."""
        apply_writes()
        for req_idx, prompt_len, sampling_params in added:
            rows.add(req_idx, sampling_params, prompt_len)
        added.clear()

    def bias(logits: Any, expanded_idx_mapping: Any, idx_mapping_np: Any, pos: Any) -> None:
        apply_bias(logits, expanded_idx_mapping, idx_mapping_np, pos)
        rows.apply_history(logits, idx_mapping_np, pos)

    def words(logits: Any, expanded_idx_mapping: Any, idx_mapping_np: Any, *rest: Any) -> None:
        apply_words(logits, expanded_idx_mapping, idx_mapping_np, *rest)
        rows.apply_cuts(logits, idx_mapping_np)

    sampler.add_request, sampler.apply_staged_writes = add, written
    sampler.logit_bias_state.apply_logit_bias = bias
    sampler.bad_words_state.apply_bad_words = words
