"""What each engine makes of each generation parameter: honoured or refused, and whether it survives a takeover.

Data that the code reads (`check_supported`, `continuation`) and the contract suite holds the engines to. A parameter
that is not in `REFUSED` is honoured; nothing is ever ignored. A refusal names the place in the engine's own source, or
in ours, that shows it can't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenfleet.engines.base import Continuation
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

CONTINUATION: Mapping[str, Mapping[str, Continuation]] = {
    # Tokens follow from (prompt, seed, index) and, with penalties, from all ids before.
    "scripted": {},
    # The draw follows from (seed, index); penalties and bars are functions of the ids so far (sampling.py), and a
    # grammar reads the delivered ids first (grammar.py). A beam search delivers all or nothing (beams.py).
    "transformers": {},
    # vLLM seeds a generator per request (vllm/v1/worker/gpu_model_runner.py). Its penalties would count the request's
    # own new ids only (vllm/v1/sample/ops/penalties.py) and its grammars start anew (vllm/v1/structured_output): a
    # continuation's are our own (engines/vllm_engine/extras.py).
    "vllm": {"seed": "valid"},
    # SGLang's penalties would count new ids only and its grammars start anew; ours don't, and a draw is a hash of
    # (seed, index) (engines/sglang_engine/sampler.py, history.py, grammars.py).
    "sglang": {},
}
"""How a request that uses the parameter goes on after a takeover; ``exact`` where nothing is said. ``valid``: a fair
sample, not the undisturbed text, as sampling without a seed is everywhere."""

SGLANG_MEDIA: Mapping[str, frozenset[str]] = {
    "LlavaForConditionalGeneration": frozenset({"image"}),
    "Qwen2VLForConditionalGeneration": frozenset({"image", "video"}),
    "Qwen2_5_VLForConditionalGeneration": frozenset({"image", "video"}),
    "Qwen3VLForConditionalGeneration": frozenset({"image", "video"}),
    "Qwen2AudioForConditionalGeneration": frozenset({"audio"}),
}
"""The architectures whose media SGLang is given, each checked against transformers; others get texts only. What
transformers and vLLM take follows from the model's processor there (docs/media.md)."""

_SGLANG_MODELS = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/models"
REFUSED_SGLANG_MEDIA: Mapping[str, Refusal] = {
    "LlavaNextForConditionalGeneration": Refusal(
        "SGLang has LLaVA-NeXT as its authors first published it, not in the form that transformers has it.",
        f"{_SGLANG_MODELS}/llava.py",
    ),
    "InternVLForConditionalGeneration": Refusal(
        "SGLang has InternVL with its authors' own code, not in the form that transformers has it.",
        f"{_SGLANG_MODELS}/internvl.py",
    ),
    "PaliGemmaForConditionalGeneration": Refusal("SGLang has no PaliGemma.", _SGLANG_MODELS),
    "Gemma3ForConditionalGeneration": Refusal(
        "An image's tokens attend to one another with one of SGLang's attention backends only, and not where a prompt "
        "is read in pieces or its beginning is cached.",
        f"{_SGLANG_MODELS}/gemma3_mm.py",
    ),
}
"""By architecture: why SGLang is not given its media; for others it is `OTHER_SGLANG_MEDIA`."""

OTHER_SGLANG_MEDIA = Refusal(
    "SGLang's models each want tensors in a form of their own, and it prepares these with processors that decode, "
    "sample and count otherwise than the other engines.",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/multimodal/processors/base_processor.py",
)

_DEFAULTS: Mapping[str, Any] = GenerationParams().model_dump()
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})
_ORDER: tuple[Continuation, ...] = ("exact", "valid", "no")


def check_supported(engine_name: str, params: GenerationParams) -> None:
    """Raises `InvalidRequest` (``unsupported_parameter``) for the first parameter that this engine refuses."""
    for param, refusal in REFUSED[engine_name].items():
        value = getattr(params, param)
        if value > refusal.above if refusal.above is not None else _is_used(params, param):
            raise InvalidRequest(
                f"The {engine_name} engine does not offer {param}={_shown(value)}: {refusal.reason}",
                code="unsupported_parameter",
                hint=_hint(engine_name, param, refusal),
                param=param,
                engine=engine_name,
                source=refusal.source,
            )


def continuation(engine_name: str, params: GenerationParams, uncontinued: frozenset[str] = frozenset()) -> Continuation:
    """How a request with these parameters goes on after a takeover: as its weakest parameter does.

    ``uncontinued``: parameters that the engine says it can't continue (`EngineInfo`)."""
    cells = {**CONTINUATION[engine_name], **dict.fromkeys(uncontinued, "no")}
    worst = max((_ORDER.index(cell) for param, cell in cells.items() if _is_used(params, param)), default=0)
    if not params.is_greedy and params.seed is None:
        worst = max(worst, _ORDER.index("valid"))
    return _ORDER[worst]


def _is_used(params: GenerationParams, param: str) -> bool:
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
