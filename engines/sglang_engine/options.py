"""What an SGLang engine is loaded with. Names are LLaMA-Factory's where it has one. No SGLang in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

OWN = frozenset(
    {
        "model_path", "tokenizer_path", "skip_tokenizer_init", "tokenizer_worker_num", "trust_remote_code", "dtype",
        "quantization", "context_length", "mem_fraction_static", "tp_size", "max_running_requests", "enable_lora",
        "lora_paths", "sampling_backend", "grammar_backend", "enable_custom_logit_processor", "stream_interval",
        "incremental_streaming_output", "speculative_algorithm", "is_embedding", "allow_auto_truncate", "revision",
    }
)  # fmt: skip
"""Arguments of SGLang that ``sglang_config`` may not name: they have an option here, or another value would change
what a request means. A speculative algorithm samples in kernels of its own, past our sampler."""

SAFE_FORMATS = frozenset({"safetensors", "dummy", "sharded_state", "bitsandbytes", "layered"})
"""Values of ``load_format`` that read no pickle."""


def _comma_list(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return () if value is None else value


def _json_mapping(value: object) -> object:
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is neither a mapping nor JSON: {error}") from error


class SglangOptions(BaseModel):
    """Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name_or_path: str = Field(min_length=1)
    """A folder, a GGUF file, a hub id, or the built-in small model's name (`engines.models.resolve`)."""
    model_revision: str | None = None
    label: str | None = None
    """The model's name for people and fingerprints; by default the last part of its path."""
    adapter_name_or_path: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = Field((), max_length=1)
    """One LoRA adapter that every request gets. SGLang merges nothing into the weights."""
    adapter_folder: str | None = None
    """Subfolder of each adapter's path or hub repository that holds its files."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name → path or hub id of LoRA adapters that a request may choose by name."""
    cache_dir: Path | None = None

    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a CPU, else the dtype of the checkpoint."""
    quantization: str | None = None
    """A method of SGLang's to quantise with while loading, such as ``fp8``. Quantised checkpoints need none."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Load weights that are not safetensors. A pickle can run code."""

    max_batch_size: int = Field(256, ge=1, le=4096)
    """Slots: sequences decoded together (SGLang's max_running_requests)."""
    sglang_maxlen: int | None = Field(None, ge=1)
    """Prompt and answer of one sequence, in tokens; None takes the model's own limit."""
    sglang_mem_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the GPU's memory for weights and KV cache; None leaves SGLang's default."""
    sglang_tp_size: int | None = Field(None, ge=1)
    """GPUs to split the model over; None: all that this worker sees."""
    sglang_config: Annotated[dict[str, Any], BeforeValidator(_json_mapping)] = Field(default_factory=dict)
    """Further arguments of SGLang's `ServerArgs`, as they are there; a mapping or JSON text."""

    def model_post_init(self, context: object) -> None:
        if taken := sorted(OWN & self.sglang_config.keys()):
            raise ValueError(f"sglang_config may not set {taken[0]!r}, which tokenfleet sets itself")
        load_format = self.sglang_config.get("load_format", "safetensors")
        if load_format not in SAFE_FORMATS and not self.allow_pickle:
            raise ValueError(f"sglang_config: load_format={load_format!r} may read pickles, which allow_pickle allows")
        if self.adapters and self.adapter_name_or_path:
            raise ValueError("adapters and adapter_name_or_path exclude one another: SGLang applies one LoRA a request")
