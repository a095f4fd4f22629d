"""What each engine refuses of the generation parameters: data that submitters, workers and engines read alike.

A parameter that is not in `REFUSED` is honoured; nothing is ever ignored. A refusal names the place in the engine's own
source, or in ours, that shows it can't. The contract suite holds the engines to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import InvalidRequest

ENGINES = ("scripted", "transformers", "vllm", "sglang")
PARAMETERS = tuple(GenerationParams.model_fields)
CORE = frozenset(
    {
        "do_sample", "temperature", "top_p", "top_k", "seed", "stop", "max_new_tokens", "min_tokens",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "logprobs", "top_logprobs",
    }
)  # fmt: skip
"""Every engine honours these."""


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str
    source: str
    above: float | None = None
    """Refused only above this value; None: whenever it is not the default."""


_VLLM_BEAMS = Refusal(
    "vLLM took beam search out of its core; what is left of it runs above the engine, a request per beam and token.",
    "https://github.com/vllm-project/vllm/pull/9105",
)
_SGLANG_BEAMS = Refusal(
    "SGLang 0.5.17, for GPUs here, has no beam search. That of 0.5.23 (beam_width) takes logits kept from before the "
    "sampler, so it knows no penalties, biases and grammars of ours; no request can set its length_penalty.",
    "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/beam_search/logits_capture.py",
)
_SCRIPTED_BEAMS = Refusal("A script has nothing to search.", "engines/scripted/model.py")

REFUSED: Mapping[str, Mapping[str, Refusal]] = {
    "scripted": {
        "num_beams": _SCRIPTED_BEAMS,
        "length_penalty": _SCRIPTED_BEAMS,
        "response_format": Refusal("Scripted words follow no grammar.", "engines/scripted/model.py"),
    },
    "transformers": {},
    "vllm": {"num_beams": _VLLM_BEAMS, "length_penalty": _VLLM_BEAMS},
    "sglang": {"num_beams": _SGLANG_BEAMS, "length_penalty": _SGLANG_BEAMS},
}

_DEFAULTS: Mapping[str, Any] = GenerationParams().model_dump()
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})


def check_supported(engine_name: str, params: GenerationParams) -> None:
    """Raises `InvalidRequest` (``unsupported_parameter``) for the first parameter that this engine refuses."""
    for param, refusal in REFUSED.get(engine_name, {}).items():  # a newer release's engine: its worker knows
        value = getattr(params, param)
        if value > refusal.above if refusal.above is not None else is_used(params, param):
            raise InvalidRequest(
                f"The {engine_name} engine does not offer {param}={_shown(value)}: {refusal.reason}",
                code="unsupported_parameter",
                hint=_hint(engine_name, param, refusal),
                param=param,
                engine=engine_name,
                source=refusal.source,
            )


def is_used(params: GenerationParams, param: str) -> bool:
    """Whether it can change what such a request gives."""
    if param in _SAMPLING and params.is_greedy:
        return False
    value = getattr(params, param)
    if param == "response_format":
        return bool(params.response_format.type != "text")
    return bool(value != _DEFAULTS[param])


def _shown(value: object) -> str:
    kind = getattr(value, "type", None)  # a response_format may hold a schema of any size
    return str(kind if kind is not None else value)


def _hint(engine_name: str, param: str, refusal: Refusal) -> str:
    if refusal.above is not None:
        return f"Use at most {refusal.above:g}."
    others = [name for name in ENGINES if param not in REFUSED[name] and name != engine_name]
    return f"Leave it out, or use a model on {' or '.join(others)}." if others else "Leave it out."
