"""A small Llama whose heads two cards can share, and a greedy answer of it, each token held to the plain model."""

from __future__ import annotations

import tempfile
from contextlib import aclosing
from pathlib import Path

from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams

TOLERANCE = 0.5
"""Of the top logit, in bfloat16 against float32, of logits of some 10."""


async def greedy_answer_is_the_models_own(engine_name, loaded):
    """``loaded(name, **options)``: an engine, started."""
    import psutil
    import torch
    import transformers as hf

    from tests.small_tokenizers import byte_level

    backend = byte_level()
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(Path(folder))
        async with loaded(engine_name, model_name_or_path=folder) as engine:
            workers = [p for p in psutil.Process().children(recursive=True) if _is_of_a_card(p)]
            assert len(workers) >= torch.cuda.device_count(), "one process a card is needed: nothing was split"
            params = GenerationParams(do_sample=False, max_new_tokens=32, ignore_eos=True)
            prompt = tuple(range(40, 60))
            async with aclosing(engine.generate(Sequence("s", prompt, params, 32))) as chunks:
                ids = [token async for chunk in chunks for token in chunk.ids]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(ids)), torch.tensor(ids)]
    assert float((logits.amax(-1) - chosen).max()) < TOLERANCE


def _is_of_a_card(process) -> bool:
    """vLLM's ``VLLM::Worker_TP0``, SGLang's ``sglang::scheduler_TP0``."""
    return "_TP" in " ".join(process.cmdline())
