"""Twice a model's context by stretching its rotary positions, as LLaMA-Factory does for inference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenfleet.wire.errors import ConfigurationError

RopeScaling = Literal["linear", "dynamic", "yarn", "llama3"]


def scaled(rope: object, context_tokens: int | None, kind: RopeScaling) -> tuple[dict[str, Any], int]:
    """A text configuration's ``rope_parameters`` and ``max_position_embeddings``, changed so.

    Raises `ConfigurationError` for a model without plain rotary positions."""
    if not context_tokens or not isinstance(rope, Mapping) or "rope_theta" not in rope:
        raise ConfigurationError("rope_scaling: this model's positions can't be scaled.")
    changed = {**rope, "rope_type": kind, "factor": 2.0}
    if kind in {"dynamic", "yarn", "llama3"}:
        changed["original_max_position_embeddings"] = context_tokens
    if kind == "llama3":
        changed |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return changed, 2 * context_tokens


def overridden(folder: Path, kind: RopeScaling, *, trust_remote_code: bool) -> tuple[dict[str, Any], int]:
    """What vLLM and SGLang are to read otherwise in the configuration of the model in ``folder``, and the context in
    tokens that this gives. Raises `ConfigurationError`."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    rope, context = scaled(
        getattr(text_config, "rope_parameters", None), getattr(text_config, "max_position_embeddings", None), kind
    )
    changed: dict[str, Any] = {"rope_parameters": rope}
    if kind != "linear":  # there both multiply the model's own limit themselves
        changed["max_position_embeddings"] = context
    # Of a model of several parts, the text's part is overridden within.
    return (changed if text_config is config else {"text_config": changed}), context
