"""How many tokens SGLang's cache holds on a CPU, where it would else take most of the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEAST_TOKENS, _SLOT_TOKENS, _BYTES = 8192, 2048, 1 << 30
_FLOAT32_BYTES = 4


def cpu_pool_tokens(config: Mapping[str, Any], slots: int) -> int:
    """Room for each of ``slots``, as far as a gigabyte goes. ``config``: the model's own.

    SGLang begins with a sequence once there is room for its prompt and all that it may say, and for a share of what
    those that run may yet say (`PrefillAdder.add_one_req` in sglang/srt/managers/schedule_policy.py). In a small pool
    slots stay empty, and the chats of a worker that died wait until others are over."""
    config = config.get("text_config") or config
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or config.get("hidden_size", 0) // heads)
    layers, kept = int(config.get("num_hidden_layers", 0)), int(config.get("num_key_value_heads") or heads)
    of_a_token = 2 * _FLOAT32_BYTES * layers * kept * width
    fitting = _BYTES // of_a_token if of_a_token else 0
    return max(_LEAST_TOKENS, min(slots * _SLOT_TOKENS, fitting))
