"""Small models with random weights, of the families people run, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from tests.small_tokenizers import byte_level
from tokenfleet.engines import models

VOCAB = 400
NEVER_BEST = [398, 399]
"""Ids that the small Llama never chooses by itself."""
_SIZE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_SLIDING = {"sliding_window": 8}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**_SIZE, tie_word_embeddings=False),
    "qwen2": lambda: hf.Qwen2Config(**_SIZE),
    "qwen3": lambda: hf.Qwen3Config(**_SIZE, head_dim=16),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_SIZE, **_EXPERTS, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**_SIZE, **_SLIDING),
    "mixtral": lambda: hf.MixtralConfig(**_SIZE, num_local_experts=4, num_experts_per_tok=2),
    "gemma": lambda: hf.GemmaConfig(**_SIZE, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**_SIZE, **_MIXED, head_dim=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**_SIZE, **_MIXED, head_dim=16),
    "cohere2": lambda: hf.Cohere2Config(**_SIZE, **_MIXED),
    "gpt_oss": lambda: hf.GptOssConfig(**_SIZE, **_MIXED, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "phi3": lambda: hf.Phi3Config(**_SIZE),
    "granite": lambda: hf.GraniteConfig(**_SIZE),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZE),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3, eos_token_id=1
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, init_std=0.3,
        max_position_embeddings=512, word_embed_proj_dim=32, pad_token_id=0, eos_token_id=1,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.3
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**_SIZE, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=32, first_k_dense_replace=1,
    ),
}  # fmt: skip


def save(family: str, folder: Path, *, poisoned_id: int | None = None):
    """Save a model and its tokenizer to ``folder``; gives the plain model to compare with."""
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().float()
    if family == "llama":
        with torch.no_grad():
            model.lm_head.weight[NEVER_BEST] = 0  # a logit of 0, where the best is always above
            if poisoned_id is not None:
                model.get_input_embeddings().weight[poisoned_id] = torch.nan
    return _saved(model, folder)


def save_wide(folder: Path):
    """A Llama whose layers are some of bitsandbytes' blocks of 64 wide, and of which the answers are clear."""
    torch.manual_seed(3)
    config = hf.LlamaConfig(**{**_SIZE, "hidden_size": 128, "intermediate_size": 256}, tie_word_embeddings=False)
    return _saved(hf.LlamaForCausalLM(config).eval().float(), folder)


def save_large_cache(folder: Path):
    """A small Llama whose KV cache takes 32 KiB a token."""
    torch.manual_seed(3)
    wide = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    config = hf.LlamaConfig(**{**_SIZE, **wide, "max_position_embeddings": 4096}, tie_word_embeddings=False)
    return _saved(hf.LlamaForCausalLM(config).eval().float(), folder)


def save_stateful(folder: Path):
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return _saved(hf.MambaForCausalLM(config), folder)


def save_classifier(folder: Path, labels: int = 1):
    torch.manual_seed(4)
    config = hf.LlamaConfig(**{**_SIZE, "head_dim": 16}, num_labels=labels)  # Triton's least
    return _saved(hf.LlamaForSequenceClassification(config).eval(), folder)


_LORAS = {
    "lora": {},
    "dora": {"use_dora": True},
    "scaled": {  # each module by a number of its own
        "use_rslora": True, "target_modules": r".*\.(q_proj|v_proj|down_proj)",
        "rank_pattern": {"q_proj": 6, r"layers\.1\.self_attn\.v_proj": 2}, "alpha_pattern": {"v_proj": 20},
    },
    "apart": {"target_modules": ["k_proj", "up_proj"]},  # without what an engine may compute with them
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [9, 10, 40]},
    "bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
}  # fmt: skip


def save_lora(model_folder: Path, folder: Path, *, seed: int = 0, kind: str = "lora"):
    """Save an adapter strong enough to change every answer; gives the model with it merged."""
    import peft

    torch.manual_seed(100 + seed)
    base = hf.AutoModelForCausalLM.from_pretrained(model_folder)
    if kind == "ia3":
        modules = ["k_proj", "v_proj", "down_proj"]
        config = peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    else:
        modules = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": modules, **_LORAS[kind]})
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_" in name:
                parameter.uniform_(0.2, 2.5)
            elif parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(0, 0.4)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()


def merged(model_folder: Path, adapters: list[Path]):
    import peft

    model = hf.AutoModelForCausalLM.from_pretrained(model_folder)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def save_value_head(model, folder: Path, form: str, *, seed: int = 5):
    """Save a value head as trl names it, next to the model; gives the function that it must compute."""
    torch.manual_seed(seed)
    weight, bias = torch.randn(1, model.config.hidden_size), torch.randn(1)
    state = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, folder / "value_head.safetensors")
    else:
        torch.save(state, folder / "value_head.bin")

    @torch.inference_mode()
    def expected(ids) -> float:
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return (out.hidden_states[-1][0, -1] @ weight[0] + bias[0]).item()

    return expected


def pickle_weights(folder: Path):
    """Put the weights of the model in ``folder`` into a pickle."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def folder_of(name: str) -> Path:
    return models.resolve(name)


def _saved(model, folder: Path):
    model.save_pretrained(folder)
    backend = byte_level()
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model
