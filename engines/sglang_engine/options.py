"""What an SGLang engine is loaded with. Names are LLaMA-Factory's where it has one. No SGLang in here."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, field_validator, model_validator

from tokenfleet.engines.options import CommaList, CoreOptions, JsonMapping, lift, refuse_own

OWN = frozenset(
    {
        "model_path", "tokenizer_path", "skip_tokenizer_init", "tokenizer_worker_num", "enable_lora",
        "lora_paths", "sampling_backend", "grammar_backend", "enable_custom_logit_processor", "stream_interval",
        "incremental_streaming_output", "speculative_algorithm", "is_embedding", "allow_auto_truncate",
        "preferred_sampling_params", "constrained_json_whitespace_pattern", "constrained_json_disable_any_whitespace",
    }
)  # fmt: skip
"""Arguments of SGLang that ``sglang_config`` may not name: they have an option here, or another value would change
what a request means, or none would do anything (SGLang's grammars are off). A speculative algorithm samples in kernels
of its own, past our sampler."""

NAMES: Final = {
    "context_length": "sglang_maxlen", "mem_fraction_static": "sglang_mem_fraction", "tp_size": "sglang_tp_size",
    "max_running_requests": "max_batch_size", "dtype": "infer_dtype", "quantization": "quantization",
    "trust_remote_code": "trust_remote_code", "revision": "model_revision",
}  # fmt: skip
"""SGLang's names of options here: ``sglang_config`` may use them, as LLaMA-Factory's files do."""

SAFE_FORMATS = frozenset({"safetensors", "dummy", "sharded_state", "bitsandbytes", "layered"})
"""Values of ``load_format`` that read no pickle."""


class SglangOptions(CoreOptions):
    """Frozen; unknown names are refused."""

    adapter_name_or_path: CommaList = ()
    """LoRA adapters that every request gets, all of them. SGLang merges nothing into the weights: they are joined to
    one adapter, and with each of ``adapters``."""

    quantization: str | None = None
    """Any method of SGLang's to quantise with at load, by SGLang's name. Quantised checkpoints need none."""

    sglang_maxlen: int | None = Field(None, ge=1)
    """Prompt and answer of one sequence, in tokens; None takes the model's own limit."""
    sglang_mem_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the GPU's memory for weights and KV cache; None leaves SGLang's default."""
    sglang_tp_size: int | None = Field(None, ge=1)
    """GPUs to split the model over; None: all that this worker sees."""
    sglang_config: JsonMapping = Field(default_factory=dict)
    """Further arguments of SGLang's `ServerArgs`, as they are there; a mapping or JSON text."""

    @field_validator("sglang_tp_size", mode="before")
    @classmethod
    def _all_gpus(cls, value: Any) -> Any:
        """LLaMA-Factory's -1 is all of them."""
        return None if value == -1 else value

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        return lift(values, "sglang_config", NAMES)

    def model_post_init(self, context: object) -> None:
        refuse_own("sglang_config", self.sglang_config, OWN)
        load_format = self.sglang_config.get("load_format", "safetensors")
        if load_format not in SAFE_FORMATS and not self.allow_pickle:
            raise ValueError(f"sglang_config: load_format={load_format!r} may read pickles, which allow_pickle allows")
        if self.quantization_bit == 4:
            # _unquantized_generator in sglang/srt/model_loader/loader.py (0.5.17, 0.5.23): "qweight" for "weight".
            raise ValueError(
                "quantization_bit=4: SGLang's loader of bitsandbytes gives weights names that its layers don't know; "
                "take 8, a checkpoint that is quantised already, or another engine"
            )
        if self.quantization_bit is not None and self.quantization is not None:
            raise ValueError("quantization_bit and quantization exclude one another: both say how to quantise")
