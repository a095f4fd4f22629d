"""Which media each engine is given of which family of models: data that the engines read and docs/media.md shows.

What is tested is held to transformers' own forward by small models (tests/contract/test_engines_media.py and
test_media.py); of the rest an engine takes what it and the model's processor offer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tokenfleet.wire.support import Refusal

KINDS = ("image", "video", "audio")


@dataclass(frozen=True, slots=True)
class Given:
    """Kinds of media, of `KINDS`."""

    tested: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()


Cell = Given | Refusal


@dataclass(frozen=True, slots=True)
class Family:
    architectures: frozenset[str]
    """As a checkpoint's config.json names them."""
    transformers: Cell
    vllm: Cell
    sglang: Cell

    def cell(self, engine: str) -> Cell:
        return {"transformers": self.transformers, "vllm": self.vllm, "sglang": self.sglang}[engine]


_IMAGES = Given(("image",))
_FILMS, _MAYBE_FILMS = Given(("image", "video")), Given(untested=("image", "video"))
_SOUNDS = Given(("audio",))
_STILLS = Given(("image",), untested=("video",))
_ANY = Given(untested=KINDS)

_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers/models"
_SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/models"
_OTHER_SGLANG = Refusal(
    "SGLang's models each want tensors in a form of their own, and it prepares these with processors that decode, "
    "sample and count otherwise than the other engines.",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/multimodal/processors/base_processor.py",
)


def _family(*names: str, transformers: Cell, vllm: Cell, sglang: Cell = _OTHER_SGLANG) -> Family:
    return Family(frozenset(f"{name}ForConditionalGeneration" for name in names), transformers, vllm, sglang)


FAMILIES: Mapping[str, Family] = {
    "LLaVA": _family("Llava", transformers=_IMAGES, vllm=_IMAGES, sglang=_IMAGES),
    "LLaVA-NeXT": _family("LlavaNext", transformers=_IMAGES, vllm=_IMAGES, sglang=_IMAGES),
    "LLaVA-NeXT-Video": _family(
        "LlavaNextVideo", transformers=_MAYBE_FILMS, vllm=Given(untested=("video",)), sglang=_MAYBE_FILMS
    ),
    "Video-LLaVA": _family("VideoLlava", transformers=_MAYBE_FILMS, vllm=_MAYBE_FILMS),
    "Qwen2-VL": _family("Qwen2VL", transformers=_FILMS, vllm=_FILMS, sglang=_FILMS),
    "Qwen2.5-VL": _family("Qwen2_5_VL", transformers=_FILMS, vllm=_FILMS, sglang=_FILMS),
    "Qwen3-VL": _family("Qwen3VL", transformers=_FILMS, vllm=_FILMS, sglang=_FILMS),
    "Qwen2-Audio": _family("Qwen2Audio", transformers=_SOUNDS, vllm=_SOUNDS, sglang=_SOUNDS),
    "InternVL": _family("InternVL", transformers=_STILLS, vllm=_FILMS, sglang=_FILMS),
    "Gemma 3": _family("Gemma3", transformers=_IMAGES, vllm=_IMAGES, sglang=_IMAGES),
    "PaliGemma": _family(
        "PaliGemma",
        transformers=_IMAGES,
        vllm=Refusal(
            "vLLM reads PaliGemma's texts from left to right only, where it was trained to read all of a prompt in "
            "both directions, and puts its image and the end of a line into each prompt by itself.",
            "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/paligemma.py",
        ),
        sglang=_IMAGES,
    ),
    "Mllama": _family(
        "Mllama",
        transformers=Refusal(
            "Some of its layers look at the image only and keep that once for all steps, which rows of a batch that "
            "come and go can't share.",
            f"{_TRANSFORMERS}/mllama/modeling_mllama.py",
        ),
        vllm=Refusal(
            "vLLM took Mllama out.",
            "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/registry.py",
        ),
        sglang=Refusal(
            "SGLang lets every token of a prompt attend to all of an image, also to what only fills it up, and to an "
            "image that comes after the token.",
            f"{_SGLANG}/mllama.py",
        ),
    ),
    "Qwen2.5-Omni, Qwen3-Omni": _family(
        "Qwen2_5Omni",
        "Qwen3OmniMoe",
        transformers=Refusal(
            "It is several models, of which one speaks; none of them by itself is what the checkpoint loads as.",
            f"{_TRANSFORMERS}/qwen2_5_omni/modeling_qwen2_5_omni.py",
        ),
        vllm=_ANY,
    ),
}

OTHERS = Family(frozenset(), transformers=_ANY, vllm=_ANY, sglang=_OTHER_SGLANG)
"""Models of no family above that have a processor."""


def cell_of(engine: str, architectures: Collection[str]) -> Cell:
    found = (family for family in FAMILIES.values() if family.architectures & set(architectures))
    return next(found, OTHERS).cell(engine)


def kinds_given(engine: str, architectures: Collection[str], offered: Iterable[str]) -> tuple[str, ...]:
    """Of the kinds that a model's processor (or the engine itself) offers."""
    cell = cell_of(engine, architectures)
    given = () if isinstance(cell, Refusal) else (*cell.tested, *cell.untested)
    return tuple(kind for kind in offered if kind in given)
