"""What a vLLM engine is loaded with. Names are LLaMA-Factory's where it has one. No vLLM in here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenfleet.engines.options import CommaList, JsonMapping, ModelOptions, refuse_own

OWN = frozenset(
    {
        "model", "tokenizer", "skip_tokenizer_init", "runner", "convert", "trust_remote_code", "dtype", "max_model_len",
        "gpu_memory_utilization", "enforce_eager", "max_num_seqs", "enable_lora", "max_lora_rank", "logits_processors",
        "generation_config", "override_generation_config", "logprobs_mode", "speculative_config", "load_format",
        "quantization", "pooler_config",
    }
)  # fmt: skip
"""Arguments of vLLM that ``vllm_config`` may not name: they have an option here, or another value would change what
a request means. Speculative decoding switches vLLM's min_p, logit_bias and our processors off."""


class VllmOptions(ModelOptions):
    """Frozen; unknown names are refused."""

    adapter_name_or_path: CommaList = ()
    """LoRA adapters that every request gets, all of them. vLLM merges nothing into the weights: they are joined to
    one adapter, and with each of ``adapters``. Also where a value head is looked for."""
    rewards: bool = False
    """A reward model, which writes no text: vLLM loads a model for one or the other. The value head beside a model or
    an adapter is used only then; a sequence classifier gives scores by itself."""

    quantization_bit: Literal[4, 8] | None = None
    quantization_method: Literal["bnb", "fp8"] | None = None
    """How ``quantization_bit`` is done at load: None takes bnb for 4 bits (vLLM before 0.32) and fp8 for 8. A
    checkpoint that is already quantised brings its own method."""
    rope_scaling: Literal["linear", "yarn", "llama3"] | None = None
    """Twice the model's context by stretching its rotary positions. Not ``dynamic``: vLLM stretches short texts too."""

    max_batch_size: int = Field(256, ge=1, le=4096)
    """Slots: sequences decoded together (vLLM's max_num_seqs)."""
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

    def model_post_init(self, context: object) -> None:
        refuse_own("vllm_config", self.vllm_config, OWN)
        if self.quantization_bit is None and self.quantization_method is not None:
            raise ValueError("quantization_method says how quantization_bit is done, and there is none")
        if (self.quantization_bit, self.quantization_method) in {(8, "bnb"), (4, "fp8")}:
            raise ValueError("vLLM quantises at load to 4 bits with bnb or to 8 with fp8")
