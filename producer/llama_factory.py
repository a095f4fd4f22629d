"""Arguments of LLaMA-Factory's that a fleet has no use for: which of them its files may hold all the same.

LLaMA-Factory's own `chat` takes them, too, and most change nothing there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from tokenfleet.wire.errors import ConfigurationError

log = logging.getLogger(__name__)

_OF_TRAINING: Final = frozenset(
    {
        "cutoff_len", "dataset", "dataset_dir", "eval_dataset", "media_dir", "overwrite_cache",
        "preprocessing_num_workers", "max_samples", "val_size", "packing", "train_on_prompt", "mask_history",
        "lora_alpha", "lora_dropout", "lora_rank", "lora_target", "additional_target", "use_rslora", "use_dora",
        "freeze_trainable_layers", "freeze_vision_tower", "freeze_multi_modal_projector", "use_unsloth_gc",
        "disable_gradient_checkpointing", "use_reentrant_gc", "enable_liger_kernel", "shift_attn", "upcast_layernorm",
        "moe_aux_loss_coef", "print_param_status", "offload_folder", "sglang_lora_backend",
    }
)  # fmt: skip
"""Whatever they say, it is of training, or of how much memory and time a model takes: no answer changes with it."""

_AS_IT_IS: Final[Mapping[str, tuple[str, ...]]] = {
    "use_fast_tokenizer": ("true",),
    "low_cpu_mem_usage": ("true",),
    "use_kv_cache": ("true",),
    "split_special_tokens": ("false",),
    "resize_vocab": ("false",),
    "use_unsloth": ("false",),
    "mixture_of_depths": ("none",),
    "train_from_scratch": ("false",),
    "upcast_lmhead_output": ("false",),
    "quantization_type": ("nf4",),
    "double_quantization": ("true",),
    "quantization_device_map": ("none", "auto"),
    "tool_format": ("none",),
    "add_tokens": ("none",),
    "add_special_tokens": ("none",),
}
"""Values that say what is done anyhow, in lower case; all others are refused."""

_INSTEAD: Final[Mapping[str, str]] = {
    "hf_hub_token": "Set HF_TOKEN where the workers start: a token is not for a file of arguments.",
    "ms_hub_token": "Fetch the model first, and name its folder.",
    "om_hub_token": "Fetch the model first, and name its folder.",
    "tool_format": "A template brings its tools' format with it.",
    "split_special_tokens": "neutral_special_tokens takes special tokens in users' texts for text.",
    "add_tokens": "Save the tokenizer with its new tokens beside the model.",
    "add_special_tokens": "Save the tokenizer with its new tokens beside the model.",
    "resize_vocab": "Save the model with its new vocabulary.",
}


def without_unused(args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` without LLaMA-Factory's names that mean nothing here; a line in the log tells which these were.

    Raises `ConfigurationError` for one whose value asks for something that is not done here."""
    rest, unused = {}, []
    for name, value in args.items():
        if name in _OF_TRAINING:
            unused.append(name)
        elif name not in _AS_IT_IS and name not in _INSTEAD:
            rest[name] = value
        elif value is not None and str(value).lower() not in _AS_IT_IS.get(name, ()):
            what = name if "token" in name else f"{name}={value}"
            hint = _INSTEAD.get(name, "Leave it out, or load the model with LLaMA-Factory.")
            raise ConfigurationError(f"{what}: LLaMA-Factory's argument has no counterpart here.", hint=hint)
    if unused:
        log.warning("not used here, only in training: %s", ", ".join(sorted(unused)))
    return rest
