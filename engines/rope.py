"""Twice a model's context by stretching its rotary positions, as LLaMA-Factory does for inference."""

from __future__ import annotations

from collections.abc import Mapping
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
