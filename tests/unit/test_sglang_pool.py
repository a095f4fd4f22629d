"""The size of SGLang's cache on a CPU."""

from __future__ import annotations

import pytest

from tokenfleet.engines.sglang_engine.pool import cpu_pool_tokens

SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3}
LLAMA_7B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}


@pytest.mark.parametrize(
    ("config", "slots", "tokens"),
    [
        (SMOLLM2, 2, 8192),
        (SMOLLM2, 8, 16384),
        (SMOLLM2, 256, (1 << 30) // (8 * 30 * 3 * 64)),
        ({"text_config": SMOLLM2, "vision_config": {"hidden_size": 9}}, 8, 16384),
        ({**SMOLLM2, "head_dim": 128}, 256, (1 << 30) // (8 * 30 * 3 * 128)),
        (LLAMA_7B, 256, 8192),
        ({}, 256, 8192),
    ],
)
def test_each_slot_has_its_room_within_a_gigabyte(config, slots, tokens):
    assert cpu_pool_tokens(config, slots) == tokens
