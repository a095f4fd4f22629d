"""A model in plain transformers, float32: the truth that an engine's tokens are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plain_model(name: str) -> Any:
    """Where SGLang has been imported, `from_pretrained` leaves rotary frequencies uninitialised; a model's constructor
    doesn't."""
    import torch
    import transformers as hf

    from tokenfleet.engines import models

    read = hf.AutoModelForCausalLM.from_pretrained(models.resolve(name), dtype=torch.float32)
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model.float().eval()


def save_lora(model: Any, folder: Path, *, seed: int) -> Any:
    """Save an adapter of ``model``, a `plain_model`, that changes its answers; gives the model with it merged."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()
