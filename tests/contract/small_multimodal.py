"""Small models that see or hear, with random weights, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.small_tokenizers import byte_level

SPECIAL = (
    "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>",
)  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% elif p.type == 'video' %}VIDEO{% elif p.type == 'audio' %}AUDIO"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def tokenizer(**more):
    backend = Tokenizer.from_str(byte_level().to_str())
    backend.add_special_tokens(list(SPECIAL))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<s>", **more
    )


def chat(image="", video="", audio=""):
    return CHAT.replace("IMAGE", image).replace("VIDEO", video).replace("AUDIO", audio)


def save(family: str, folder: Path, **more):
    """Save a model, its tokenizer and its processor to ``folder``; gives the plain model to compare with."""
    torch.manual_seed(7)
    model = _MAKERS[family](folder, **more).eval().float()
    with torch.no_grad():  # what an image or a sound is must reach the answer
        for name, parameter in model.named_parameters():
            if "projector" in name or "merger" in name:
                parameter.mul_(4) if parameter.any() else parameter.normal_(0, 0.3)
        if "gemma" in family:  # which would say again what it reads: it writes by what it reads with
            model.get_input_embeddings().weight.mul_(0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        _position_as_qwen(model.model)
    return model


def _position_as_qwen(model):
    """See `go_on_after_videos` and `space_frames`: the plain model is to be the one that Qwen trained."""
    plain = model.get_rope_index

    def get_rope_index(*args, **named):
        positions, deltas = plain(*args, **named)
        types = named["mm_token_type_ids"]
        assert len(types) == 1
        seconds, grids = (named.get(name) for name in ("second_per_grid_ts", "video_grid_thw"))
        videos = iter([] if seconds is None or grids is None else list(zip(seconds, grids.tolist(), strict=True)))
        for place in range(types.shape[1]):
            if types[0, place] != 2 or types[0, place - 1] == 2:
                continue
            if (video := next(videos, None)) is None:
                break
            apart, (steps, height, width) = video[0] * model.config.vision_config.tokens_per_second, video[1]
            size = height * width // model.config.vision_config.spatial_merge_size**2
            for token in range(steps * size):
                positions[0, 0, place + token] = positions[1, 0, place] + int(token // size * apart)
        for place in range(1, types.shape[1]):
            if types[0, place - 1] and not types[0, place]:
                after = int(positions[:, 0, :place].max()) + 1
                positions[:, 0, place:] += after - int(positions[0, 0, place])
        return positions, torch.full_like(deltas, int(positions.max()) + 1 - types.shape[1])

    model.get_rope_index = get_rope_index


def as_on_the_hub(folder: Path):
    """Give the weights the names that the hub's checkpoints have, where transformers 5 saves others."""
    weights = load_file(folder / "model.safetensors")
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1).replace(
            "model.model.model.", "model.model."
        ): value
        for name, value in weights.items()
    }
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def _ids(tok, *tokens):
    return [tok.convert_tokens_to_ids(token) for token in tokens]


def _llava(folder, **text):
    tok = tokenizer()
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        initializer_range=0.3,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tok), **text),
        image_token_id=_ids(tok, "<image>")[0], vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    hf.LlavaProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat(image="<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _qwen_vl(
    folder, config_class, model_class, vision_more, text_more=None, processor_class="Qwen2VLProcessor", patch=14
):
    tok = tokenizer()
    image, video, start, end = _ids(tok, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
        **(text_more or {}).pop("rope", {}),
    }
    config = config_class(
        text_config={**TEXT, "vocab_size": len(tok), "rope_parameters": rope, **(text_more or {})},
        vision_config={"depth": 2, "patch_size": patch, "initializer_range": 0.3, **vision_more},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    tok.chat_template = chat(
        image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
    )
    tok.save_pretrained(folder)
    # As Qwen's checkpoints have it, and without torchvision: transformers can't make (or save) this processor here.
    images = hf.Qwen2VLImageProcessorPil(size=size, patch_size=patch)
    images.save_pretrained(folder)
    _add(folder / "preprocessor_config.json", processor_class=processor_class)
    return model_class(config)


def _sections(head_dim):
    """Of a head's rotary positions: time, height, width."""
    half = head_dim // 2
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def _qwen2_vl(folder, head_dim=12):
    """``head_dim`` 32 is vLLM's least on a CPU."""
    hidden = 4 * head_dim
    vision = {"embed_dim": 32 if hidden == 48 else 64, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2}
    text = {"hidden_size": hidden, "rope": {"mrope_section": _sections(head_dim)}}
    return _qwen_vl(folder, hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, vision, text)


def _qwen2_5_vl(folder, head_dim=12):
    hidden = 4 * head_dim
    vision = {
        "hidden_size": 32 if hidden == 48 else 64, "out_hidden_size": hidden, "num_heads": 2, "intermediate_size": 48,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    return _qwen_vl(
        folder, hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, vision,
        {"hidden_size": hidden, "rope": {"mrope_section": _sections(head_dim)}},
        processor_class="Qwen2_5_VLProcessor",
    )  # fmt: skip


def _qwen3_vl(folder, head_dim=12):
    hidden = 4 * head_dim
    vision = {
        "hidden_size": 32 if hidden == 48 else 64, "out_hidden_size": hidden, "num_heads": 2, "intermediate_size": 48,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    return _qwen_vl(
        folder, hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, vision,
        text_more={
            "head_dim": head_dim, "hidden_size": hidden,
            "rope": {"mrope_interleaved": True, "mrope_section": _sections(head_dim)},
        },
        processor_class="Qwen3VLProcessor", patch=16,
    )  # fmt: skip


def _qwen2_audio(folder, head_dim=12, rate=16000):
    """``rate``: Hz that it hears."""
    tok = tokenizer()
    audio = hf.Qwen2AudioEncoderConfig(
        num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, d_model=32,
        max_source_positions=1500, init_std=0.3,
    )  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=audio,
        text_config=hf.Qwen2Config(**{**TEXT, "hidden_size": 4 * head_dim}, vocab_size=len(tok)),
        audio_token_index=_ids(tok, "<|AUDIO|>")[0],
    )  # fmt: skip
    features = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=30 * 16000 // rate, sampling_rate=rate)
    hf.Qwen2AudioProcessor(
        features, tok, chat_template=chat(audio="<|audio_bos|><|AUDIO|><|audio_eos|>")
    ).save_pretrained(folder)
    return hf.Qwen2AudioForConditionalGeneration(config)


def _gemma3(folder, head_dim=16):
    tok = tokenizer(
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"
        }
    )  # fmt: skip
    tok.add_tokens(["\n" * count for count in range(1, 5)])  # as Gemma's; vLLM looks for them
    soft, boi, eoi = _ids(tok, "<image_soft_token>", "<start_of_image>", "<end_of_image>")
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = {
        **TEXT,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": 1,  # attends to few tokens, not to all as much
        "tie_word_embeddings": True,  # as all of Google's
    }
    config = hf.Gemma3Config(
        vision_config=vision, text_config=hf.Gemma3TextConfig(**text, vocab_size=len(tok)), mm_tokens_per_image=16,
        boi_token_index=boi, eoi_token_index=eoi, image_token_index=soft, image_token_id=soft,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    images = hf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    hf.Gemma3Processor(images, tok, image_seq_length=16, chat_template=chat(image="<start_of_image>")).save_pretrained(
        folder
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _llava_next(folder, head_dim=12):
    config, images, tok = _llava_next_parts(hf.LlavaNextConfig, head_dim)
    hf.LlavaNextProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat(image="<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_next_video(folder, head_dim=12):
    # vLLM divides by the size in patches of a patch.
    config, images, tok = _llava_next_parts(hf.LlavaNextVideoConfig, head_dim, size=12, patch=3)
    config.video_token_index = _ids(tok, "<video>")[0]
    tok.chat_template = chat(image="<image>", video="<video>")
    tok.save_pretrained(folder)
    images.save_pretrained(folder)
    kind = {"processor_class": "LlavaNextVideoProcessor"}
    _add(folder / "preprocessor_config.json", **kind)
    told = {"patch_size": 3, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(told | kind))
    videos = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
    videos["video_processor_type"] = "LlavaNextVideoVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return hf.LlavaNextVideoForConditionalGeneration(config)


def _llava_next_parts(config_class, head_dim, size=28, patch=14):
    tok = tokenizer()
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        patch_size=patch, initializer_range=0.3,
    )  # fmt: skip
    grid = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    config = config_class(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tok), head_dim=head_dim),
        image_grid_pinpoints=grid, image_token_index=_ids(tok, "<image>")[0], vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=grid
    )
    return config, images, tok


def _intern_vl(folder, head_dim=12):
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tok = tokenizer(extra_special_tokens=names)
    tok.chat_template = chat(image="<IMG_CONTEXT>", video="<video>")
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [28, 28], "patch_size": [7, 7], "initializer_range": 0.3,
    }  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**{**TEXT, "hidden_size": 4 * head_dim}, vocab_size=len(tok)),
        image_token_id=_ids(tok, "<IMG_CONTEXT>")[0],
    )  # fmt: skip
    tok.save_pretrained(folder)
    hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    _add(folder / "preprocessor_config.json", processor_class="InternVLProcessor")
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "InternVLProcessor"}')
    return hf.InternVLForConditionalGeneration(config)


def _paligemma(folder, head_dim=16):
    tok = tokenizer()
    text = {**TEXT, "head_dim": head_dim, "tie_word_embeddings": True}
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    images = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    hf.PaliGemmaProcessor(images, tok, chat_template=chat(image="<image>")).save_pretrained(folder)
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=hf.GemmaConfig(**text, vocab_size=len(tok)), projection_dim=48,
        image_token_index=_ids(tok, "<image>")[0], image_token_id=_ids(tok, "<image>")[0], initializer_range=0.3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def _add(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


_MAKERS = {
    "intern_vl": _intern_vl,
    "paligemma": _paligemma,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "qwen2_audio": _qwen2_audio,
}
