"""A model in plain transformers, float32: the truth that an engine's tokens are held to."""

from __future__ import annotations

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
