"""What a vLLM engine is loaded with. Names are LLaMA-Factory's where it has one. No vLLM in here."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, model_validator

from tokenfleet.engines.options import CommaList, CoreOptions, JsonMapping, lift, refuse_own

OWN = frozenset(
    {
        "model", "tokenizer", "skip_tokenizer_init", "runner", "convert", "enable_lora", "logits_processors",
        "generation_config", "override_generation_config", "logprobs_mode", "speculative_config", "load_format",
        "quantization", "pooler_config", "worker_extension_cls",
    }
)  # fmt: skip
"""Arguments of vLLM that ``vllm_config`` may not name: they have an option here, or another value would change
what a request means. Speculative decoding switches vLLM's min_p, logit_bias and our processors off."""

NAMES: Final = {
    "max_model_len": "vllm_maxlen", "gpu_memory_utilization": "vllm_gpu_util", "enforce_eager": "vllm_enforce_eager",
    "max_lora_rank": "vllm_max_lora_rank", "max_num_seqs": "max_batch_size", "dtype": "infer_dtype",
    "trust_remote_code": "trust_remote_code", "revision": "model_revision",
}  # fmt: skip
"""vLLM's names of options here: ``vllm_config`` may use them, as LLaMA-Factory's files do."""


class VllmOptions(CoreOptions):
    """Frozen; unknown names are refused."""

    adapter_name_or_path: CommaList = ()
    """LoRA adapters that every request gets, all of them. vLLM merges nothing into the weights: they are joined to
    one adapter, and with each of ``adapters``. Also where a value head is looked for."""
    rewards: bool = False
    """A reward model, which writes no text: vLLM loads a model for one or the other. The value head beside a model or
    an adapter is used only then; a sequence classifier gives scores by itself."""

    vllm_maxlen: int | None = Field(None, ge=1)
    """Prompt and answer of one sequence, in tokens; None takes the model's own limit."""
    vllm_gpu_util: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory; None leaves vLLM's default."""
    vllm_enforce_eager: bool = False
    """No CUDA graphs and no compiling: a quicker start, slower tokens."""
    vllm_max_lora_rank: int | None = Field(None, ge=1)
    """None: what the adapters need."""
    vllm_config: JsonMapping = Field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, as they are there; a mapping or JSON text."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        return lift(values, "vllm_config", NAMES)

    def model_post_init(self, context: object) -> None:
        refuse_own("vllm_config", self.vllm_config, OWN)
