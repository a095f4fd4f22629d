"""In a scheduler process: where SGLang's own models see or hear otherwise than they were trained to. Its Qwen2-Audio
lets a sound attend to the silence that it is padded with, and its Qwen2.5-VL a frame to all other frames. Here both are
computed as transformers does. `seeing` has the models of which SGLang has the language model alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import transformers


def install(architectures: Collection[str]) -> None:
    """To be called before the model is made."""
    if "Qwen2AudioForConditionalGeneration" in architectures:
        _hear()
    if "Qwen2_5_VLForConditionalGeneration" in architectures:
        _see_frames()
    if "Qwen2VLForConditionalGeneration" in architectures:
        # The hub's checkpoints name their colours; those that transformers 5 saves don't, and SGLang asks for it.
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig.in_chans = 3


def _see_frames() -> None:
    """In layers without windows SGLang lets a frame see the whole video; the model was trained to attend within it."""
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VisionTransformer as Vision

    see = Vision.forward

    def forward(model: Any, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        frames = torch.repeat_interleave(grid_thw, grid_thw[:, 0], dim=0)  # an image each
        frames[:, 0] = 1
        seen: torch.Tensor = see(model, x, frames)
        return seen

    Vision.forward = forward


def _hear() -> None:
    from sglang.srt.models.qwen2_audio import Qwen2AudioForConditionalGeneration as Qwen2Audio
    from transformers.masking_utils import create_bidirectional_mask

    def audio_feature(model: Any, items: list[Any]) -> torch.Tensor:
        tower = model.audio_tower
        features = torch.cat([item.feature for item in items]).to(tower.device, tower.dtype)
        heard = torch.cat([item.feature_attention_mask for item in items]).sum(-1)
        frames, tokens = tower._get_feat_extract_output_lengths(heard)
        most = (features.shape[-1] - 2) // 2 + 1
        mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=features.new_zeros(len(features), most, 1),
            attention_mask=(torch.arange(most) < frames[:, None]).long().to(features.device),
        )
        sounds = model.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
        return torch.cat([sound[:length] for sound, length in zip(sounds, tokens.tolist(), strict=True)])

    Qwen2Audio.get_audio_feature = audio_feature
