"""Our generation parameters as vLLM's `SamplingParams`, with the same meaning; what it lacks goes to `extras`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from vllm import PoolingParams, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tokenfleet.engines.base import Sequence
from tokenfleet.engines.stopping import ending_ids
from tokenfleet.engines.vllm_engine import compat
from tokenfleet.engines.vllm_engine.extras import EXTRAS
from tokenfleet.wire.chat import GenerationParams, ResponseFormat
from tokenfleet.wire.errors import InvalidRequest

# vLLM lifts lower temperatures to the one and refuses higher ones than the other (vllm/sampling_params.py).
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
_MOST_BIASES = 1024
"""vLLM's model runner V2 has room for no more (vllm/v1/worker/gpu/sample/logit_bias.py), and fails all with one."""


def sampling_params(sequence: Sequence, tokenizer: Mapping[str, Any], special: re.Pattern[str]) -> SamplingParams:
    """``sequence`` as vLLM is to sample it after prompt and delivered ids. Raises `InvalidRequest`.

    ``tokenizer``: what `extras.Guides` is to know of it; ``special`` finds its special tokens in a text."""
    params, delivered = sequence.params, len(sequence.delivered_ids)
    stop_ids = sorted(ending_ids(params, sequence.eos_ids))
    extras: dict[str, Any] = {}
    if params.min_tokens > delivered and stop_ids:
        extras |= {"barred": stop_ids, "barred_until": params.min_tokens - delivered}
    bias = dict(params.logit_bias)
    if len(bias) > _MOST_BIASES:
        extras |= {"bias_ids": list(bias), "bias": list(bias.values())}
        bias = {}
    penalties = {
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
    }
    if delivered and (params.presence_penalty or params.frequency_penalty):
        # All three are ours then, since they have an order. A repetition penalty alone counts the prompt anyhow.
        extras |= {name.removesuffix("_penalty"): value for name, value in penalties.items()}
        extras["delivered"] = delivered
        penalties = {}
    cuts = {} if params.is_greedy else _cuts(params)
    structured: Mapping[str, Any] = {}
    if params.response_format.type != "text" and (
        delivered or params.logprobs or params.ignore_eos or names_special(special, params.response_format)
    ):
        # vLLM's own begins anew, is in its logprobs already, lets any text follow an EOS that doesn't end one, and
        # takes a special token for its name written out.
        extras |= {"response_format": params.response_format.model_dump(mode="json"), "delivered": delivered}
        extras |= tokenizer
    else:
        structured = _structured(params.response_format)
    if "cut" in cuts:
        extras["cut"] = cuts.pop("cut")
    return SamplingParams(
        temperature=0.0 if params.is_greedy else cuts.pop("temperature"),
        **cuts,
        **penalties,
        seed=None if params.is_greedy else continued_seed(sequence.seed, delivered),
        stop_token_ids=stop_ids,
        ignore_eos=True,  # what ends a sequence is all in stop_ids
        max_tokens=sequence.max_new_tokens - delivered,
        logprobs=params.top_logprobs if params.logprobs else None,
        logit_bias=bias or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={EXTRAS: extras} if extras else None,
        **structured,
    )


def pooling_params(*, is_hidden: bool) -> PoolingParams:
    """The last token's hidden state as it is, or a classifier's own score before any squashing."""
    return PoolingParams(task="embed" if is_hidden else "classify", use_activation=False)


def continued_seed(seed: int | None, delivered: int) -> int | None:
    """The seed of a choice that goes on after ``delivered`` tokens: vLLM starts a new generator for each request, and
    the same seed would draw the first tokens' random numbers a second time."""
    if seed is None or not delivered:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}@{delivered}".encode()).digest()[:8], "big") >> 1


def names_special(special: re.Pattern[str], wanted: ResponseFormat) -> bool:
    """Whether a special token may be written out in texts of that form; a regular expression escapes some of it."""
    return special.search(wanted.model_dump_json().replace("\\", "")) is not None


def _cuts(params: GenerationParams) -> dict[str, Any]:
    top_k = max(params.top_k, 0)
    if _LEAST_TEMPERATURE <= params.temperature <= _MOST_TEMPERATURE and not (params.min_p and params.top_p < 1):
        return {"temperature": params.temperature, "top_k": top_k, "top_p": params.top_p, "min_p": params.min_p}
    return {"temperature": 1.0, "cut": [params.temperature, top_k, params.top_p, params.min_p]}


def _structured(wanted: ResponseFormat) -> Mapping[str, Any]:
    match wanted.type:
        case "text":
            return {}
        case "json_object":
            # Not vLLM's json_object: its backends differ on whether any JSON value or only an object will do.
            return compat.structured_outputs(json='{"type": "object"}')
        case "json_schema" if wanted.json_schema is not None:
            return compat.structured_outputs(json=json.dumps(wanted.json_schema))
        case "regex" if wanted.pattern is not None:
            return compat.structured_outputs(regex=wanted.pattern)
        case "grammar" if wanted.grammar is not None:
            return compat.structured_outputs(grammar=wanted.grammar)
        case kind:
            raise InvalidRequest(f"response_format {kind} lacks what it is to follow.", param="response_format")
