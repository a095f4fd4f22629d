"""In SGLang's processes: models that see, put together from transformers' eyes and SGLang's own language model.

SGLang has none of these families in the form that transformers has them, or sees otherwise: its LLaVA knows the tower
of Pixtral alone, its LLaVA-NeXT and InternVL are their authors' own code, it has no PaliGemma, and its Gemma 3 lets an
image's tokens attend to one another with one attention backend only. What tokens of a prompt attend to beyond what
stands before them is computed here, beside whatever backend there is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

import torch
import transformers
from sglang.srt.configs import model_config
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.registry import ModelRegistry
from torch import nn

from tokenfleet.engines.sglang_engine.both_ways import OF_IMAGES, OF_PROMPT, Block, attention, blocks

_BOTH_WAYS = {"Gemma3ForConditionalGeneration": OF_IMAGES, "PaliGemmaForConditionalGeneration": OF_PROMPT}
"""What of a prompt is read in both directions."""
SEEING = frozenset(
    {
        *_BOTH_WAYS, "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration", "InternVLForConditionalGeneration",
    }
)  # fmt: skip
_SCALES_WHAT_IS_GIVEN = frozenset({"gemma", "gemma2"})
"""Language models that SGLang lets multiply images, too, by what transformers multiplies texts with only."""


def register(architectures: Collection[str]) -> None:
    """To be called before SGLang reads what kind of model this is, and before the model is made."""
    for name in SEEING & set(architectures):
        ModelRegistry.models[name] = SeeingModel
        if name not in model_config.multimodal_model_archs:
            model_config.multimodal_model_archs.append(name)


def arguments(architectures: Collection[str]) -> dict[str, Any]:
    """Of SGLang's arguments, what these models need."""
    kinds = {_BOTH_WAYS[name] for name in _BOTH_WAYS.keys() & set(architectures)}
    if not kinds:
        return {}
    needed = {"enable_multimodal": True, "chunked_prefill_size": -1}  # all of a prompt, or of an image, at once
    # What a prompt begins with is computed otherwise in every prompt.
    return needed | ({"disable_radix_cache": True} if OF_PROMPT in kinds else {})


class SeeingModel(nn.Module):
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.eyes = _eyes(config)
        text = config.text_config
        if hasattr(text, "hidden_activation") and not hasattr(text, "hidden_act"):
            text.hidden_act = text.hidden_activation  # SGLang's Gemma 2 reads both, checkpoints may have one
        causal = transformers.AutoModelForCausalLM._model_mapping[type(text)]
        language, _ = ModelRegistry.resolve_model_cls(causal.__name__)
        self.language_model = language(
            text, quant_config=quant_config, prefix=f"{prefix}.language_model" if prefix else "language_model"
        )
        if not hasattr(language, "get_input_embeddings"):
            self.language_model.get_input_embeddings = lambda: self.language_model.model.embed_tokens
        self.logits_processor = self.language_model.logits_processor
        if hasattr(language, "supported_lora_modules"):
            self.supported_lora_modules = language.supported_lora_modules
        self._both_ways = next((_BOTH_WAYS[name] for name in config.architectures if name in _BOTH_WAYS), None)
        self._blocks: list[Block] = []
        self._scale = text.hidden_size**-0.5 if text.model_type in _SCALES_WHAT_IS_GIVEN else 1.0
        if self._both_ways:
            for module in self.language_model.modules():
                if isinstance(module, RadixAttention):
                    module.register_forward_hook(self._see_blocks, with_kwargs=True)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_attention_sliding_window_size(self) -> int | None:
        own = getattr(self.language_model, "get_attention_sliding_window_size", None)
        return None if own is None else own()

    def should_apply_lora(self, name: str) -> bool:
        return name.startswith("language_model.")

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        """``[tokens, width]`` of all items, one after the other."""
        return self._seen(self.eyes.get_image_features, items)

    def get_video_feature(self, items: list[Any]) -> torch.Tensor:
        return self._seen(getattr(self.eyes, "get_video_features", self.eyes.get_image_features), items)

    def _seen(self, see: Any, items: list[Any]) -> torch.Tensor:
        first = next(self.eyes.parameters())
        features = []
        for item in items:
            pixels = torch.as_tensor(item.feature).to(first.device, first.dtype)
            named = {
                name: torch.as_tensor(value).to(first.device)
                for name, value in item.model_specific_data.items()
                if name in inspect.signature(see).parameters
            }
            seen = see(pixels, **named)
            seen = getattr(seen, "pooler_output", seen)
            features += [each.reshape(-1, each.shape[-1]) for each in seen]
        return torch.cat(features) * self._scale

    @torch.no_grad()
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, get_embedding: bool = False) -> Any:
        more = {"get_embedding": True} if get_embedding else {}
        self._blocks = blocks(forward_batch, self._both_ways) if self._both_ways else []
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.get_image_feature, Modality.VIDEO: self.get_video_feature},
            positions=positions,
            **more,
        )

    def _see_blocks(self, layer: Any, args: Any, named: Any, output: torch.Tensor) -> torch.Tensor | None:
        """After an attention layer, whose keys and values are kept by now: what its blocks' tokens attend to."""
        if not self._blocks:
            return None
        backend = get_attn_backend()
        keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = backend.token_to_kv_pool.get_value_buffer(layer.layer_id)
        queries = args[0].view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        seen = output.view(-1, layer.tp_q_head_num, layer.v_head_dim).clone()
        for block in self._blocks:
            places = backend.req_to_token_pool.req_to_token[block.request, : block.end]
            seen[block.rows] = attention(layer, block, queries[block.rows], keys[places], values[places])
        return seen.view(output.shape)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises `ValueError` where the checkpoint lacks some of what sees."""
        wanted = dict(self.eyes.named_parameters())
        heads: list[torch.Tensor] = []
        self.language_model.load_weights(_texts(weights, wanted, heads))
        if lacking := sorted(name for name in wanted if ".head." not in name):  # that is for what one picture is of
            raise ValueError(f"The checkpoint lacks {', '.join(lacking[:3])}, … of what sees.")
        head, embedding = getattr(self.language_model, "lm_head", None), self.get_input_embeddings()
        if head is None or head is embedding or not isinstance(getattr(head, "weight", None), nn.Parameter):
            return
        # SGLang asks the language model's config alone whether the two are one; transformers, the whole model's.
        if heads:
            getattr(head.weight, "weight_loader", default_weight_loader)(head.weight, heads[0])
        else:
            head.weight.data.copy_(embedding.weight.data)


def _eyes(config: Any) -> Any:
    """transformers' own model, of whose language model as good as nothing is made, and nothing kept."""
    # For a CPU SGLang makes the given one's numbers rounder.
    config = type(config).from_pretrained(config._name_or_path)
    small = copy.deepcopy(config)
    text = small.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    if getattr(text, "layer_types", None):
        text.layer_types = []
    made = transformers.AutoModel.from_config(small, dtype=torch.get_default_dtype())
    del made.language_model
    made.config = config
    return made


def _texts(
    weights: Iterable[tuple[str, torch.Tensor]], wanted: dict[str, torch.Tensor], heads: list[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's weights, by the names that it has alone, its head's also to ``heads``; the others go where
    ``wanted`` names them, and out of there.

    Checkpoints have names of three ages: with or without ``model.`` before all, a level more or less in a tower."""
    for name, weight in weights:
        plain = name.removeprefix("model.").removeprefix("language_model.")
        if name.endswith("lm_head.weight"):
            heads.append(weight)
        if plain.startswith("lm_head."):
            yield plain, weight
        elif "language_model." in name:
            yield f"model.{plain.removeprefix('model.')}", weight
        else:  # there may be more than is asked for
            shorter = plain.replace("_tower.vision_model.", "_tower.")
            found = wanted.pop(plain if plain in wanted else shorter, None)
            if found is not None:
                found.data.copy_(weight)
