"""What a transformers engine is loaded with. Names are LLaMA-Factory's where it has one. No torch in here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenfleet.engines.options import CommaList, ModelOptions


class TransformersOptions(ModelOptions):
    """Frozen; unknown names are refused."""

    adapter_name_or_path: CommaList = ()
    """Adapters merged into the weights at start, in this order. Also where a value head is looked for."""

    quantization_bit: Literal[4, 8] | None = None
    quantization_method: Literal["bnb", "hqq", "eetq"] = "bnb"
    """How ``quantization_bit`` is done at load; a checkpoint that is already quantised brings its own method."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """Torch's threads on a CPU; None leaves what the environment set."""

    max_batch_size: int | None = Field(None, ge=1, le=1024)
    """Slots: sequences decoded together. None: 16 on a CPU, 64 on a GPU."""
    max_context_tokens: int | None = Field(None, ge=1)
    """Prompt and answer of one sequence; None takes the model's own limit."""
    kv_budget_tokens: int | None = Field(None, ge=1)
    """Tokens the KV caches may hold, padding included. Sequences wait in the engine until there is room.
    None: what fits 30 % of the memory that is free after loading."""
    prefill_chunk_tokens: int | None = Field(None, ge=8)
    """Prompt tokens computed between two decode steps: what a long prompt may hold up its neighbours by.
    None: 128 on a CPU, 2048 on a GPU."""
