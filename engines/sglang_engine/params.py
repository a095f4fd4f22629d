"""A sequence as SGLang gets it. Of its sampling parameters SGLang is told the ends alone; the rest is for `sampler`."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from tokenfleet.engines.base import Sequence
from tokenfleet.engines.stopping import ending_ids

KEY = "tokenfleet"
"""Marks the ``custom_params`` of our requests. Values may be numbers, texts or flat lists: they cross a process."""


def sampling_params(sequence: Sequence) -> dict[str, Any]:
    """SGLang's sampling parameters for what comes after prompt and delivered ids."""
    stop_ids = sorted(ending_ids(sequence.params, sequence.eos_ids))
    return {
        "max_new_tokens": sequence.max_new_tokens - len(sequence.delivered_ids),
        "temperature": 0.0 if sequence.params.is_greedy else 1.0,
        "stop_token_ids": stop_ids or None,
        "ignore_eos": not stop_ids,  # would ignore those; without any SGLang can reserve all of the answer's cache
        "skip_special_tokens": False,
        "custom_params": custom_params(sequence, stop_ids),
    }


def custom_params(sequence: Sequence, stop_ids: list[int]) -> dict[str, Any]:
    """What `sampler.Batch` reads; only what is out of the ordinary is in there."""
    params = sequence.params
    found: dict[str, Any] = {KEY: 1, "prompt": len(sequence.prompt_ids), "delivered": len(sequence.delivered_ids)}
    if not params.is_greedy:
        found |= {"temperature": params.temperature, "seed": _key(sequence.seed)}
        found |= {"top_k": max(params.top_k, 0), "top_p": params.top_p, "min_p": params.min_p}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if value != (1.0 if name == "repetition_penalty" else 0.0):
            found[name] = value
    if params.logit_bias:
        found |= {"bias_ids": list(params.logit_bias), "bias": list(params.logit_bias.values())}
    if stop_ids and params.min_tokens > len(sequence.delivered_ids):
        found |= {"barred": stop_ids, "min_tokens": params.min_tokens}
    if params.response_format.type != "text":
        found |= {"grammar": params.response_format.model_dump_json(exclude_none=True), "stop_ids": stop_ids}
    return found


def _key(seed: int | None) -> int:
    """The key of a sequence's random numbers: without a seed a fresh one, else the seed's own, 63 bits either way."""
    if seed is None:
        return secrets.randbits(63)
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little") >> 1
