"""In a scheduler process: what of a model sees and hears, where SGLang's own has none of it or another one.

SGLang 0.5.23's `LlavaForConditionalGeneration` knows the tower of Pixtral alone, not CLIP or SigLIP, which LLaVA's
checkpoints have; its Qwen2-Audio lets a sound attend to the silence that it is padded with, and its Qwen2.5-VL a frame
to all other frames. Here all are computed as transformers does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import transformers
from torch import nn

_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})


def install(architectures: Collection[str]) -> None:
    """To be called before the model is made."""
    if "LlavaForConditionalGeneration" in architectures:
        _see()
    if "Qwen2AudioForConditionalGeneration" in architectures:
        _hear()
    if "Qwen2_5_VLForConditionalGeneration" in architectures:
        _see_frames()
    if "Qwen2VLForConditionalGeneration" in architectures:
        # The hub's checkpoints name their colours; those that transformers 5 saves don't, and SGLang asks for it.
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig.in_chans = 3


class Tower(nn.Module):
    """transformers' own vision model, loaded as SGLang loads a part."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.model = transformers.AutoModel.from_config(config, dtype=torch.get_default_dtype())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in weights:
            name = name.removeprefix("vision_model.")  # hub checkpoints are of a transformers that had one more level
            if not name.endswith("position_ids"):
                parameters[name].data.copy_(weight)

    def forward(self, pixels: torch.Tensor, layers: int | list[int], drops_first: bool) -> torch.Tensor:
        """``[images, tokens, width]`` of one layer, or of several side by side."""
        first = next(self.model.parameters())
        states = self.model(pixels.to(first.device, first.dtype), output_hidden_states=True).hidden_states
        seen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        return torch.cat([each[:, 1:] if drops_first else each for each in seen], dim=-1)


def _see() -> None:
    from sglang.srt.models.llava import LlavaForConditionalGeneration as Llava

    classes, seen = Llava._get_sgl_model_cls, Llava.get_image_feature

    def model_class(model: Any, config: Any, *args: Any) -> Any:
        return Tower if config.model_type in _TOWERS else classes(model, config, *args)

    def image_feature(model: Any, items: list[Any]) -> Any:
        if not isinstance(model.vision_tower, Tower):
            return seen(model, items)
        drops_first = model.vision_feature_select_strategy == "default"
        pixels = torch.cat([torch.as_tensor(item.feature) for item in items])
        features = model.vision_tower(pixels, model.vision_feature_layer, drops_first)
        return model.multi_modal_projector(features).flatten(0, 1)

    load = Llava.load_weights

    def load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        # It counts tokens by the strategy, knows two of them, and is not asked for these numbers here.
        strategy, model.vision_feature_select_strategy = model.vision_feature_select_strategy, "full"
        try:
            return load(model, weights)
        finally:
            model.vision_feature_select_strategy = strategy

    Llava._get_sgl_model_cls, Llava.get_image_feature, Llava.load_weights = model_class, image_feature, load_weights


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
