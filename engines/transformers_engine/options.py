"""What a transformers engine is loaded with. Names are LLaMA-Factory's where it has one. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from tokenfleet.engines.media.settings import MediaSettings


def _comma_list(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return () if value is None else value


class TransformersOptions(MediaSettings):
    """Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name_or_path: str = Field(min_length=1)
    """A folder, a GGUF file, a hub id, or the built-in small model's name (`engines.models.resolve`)."""
    model_revision: str | None = None
    label: str | None = None
    """The model's name for people and fingerprints; by default the last part of its path."""
    adapter_name_or_path: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = ()
    """Adapters merged into the weights at start, in this order. Also where a value head is looked for."""
    adapter_folder: str | None = None
    """Subfolder of each adapter's path or hub repository that holds its files."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name → path or hub id of adapters that a request may choose by name."""
    cache_dir: Path | None = None

    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a CPU (few have fast 16-bit arithmetic), else the dtype of the checkpoint."""
    quantization_bit: Literal[4, 8] | None = None
    quantization_method: Literal["bnb", "hqq", "eetq"] = "bnb"
    """How ``quantization_bit`` is done at load; a checkpoint that is already quantised brings its own method."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Load weights that are not safetensors. A pickle can run code."""
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
