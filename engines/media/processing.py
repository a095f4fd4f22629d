"""A multimodal model's processor: from decoded media to the tensors and the text that the model takes for them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenfleet.engines.base import Media
from tokenfleet.engines.media import Decoded, MediaSettings, decode
from tokenfleet.engines.media.decoding import Recent, digest_of
from tokenfleet.engines.media.failures import invalid, too_large
from tokenfleet.engines.media.frames import FramesAsImages
from tokenfleet.engines.templates.expansion import Expansion
from tokenfleet.wire.errors import ConfigurationError

_KEPT_BYTES = 256 << 20
_FAILURES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, NotImplementedError, ArithmeticError)
"""What processors raise for media that they can't take: too narrow, too short, of an odd shape."""
_PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # LLaMA-Factory's; and so are these
_TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request's media as the model takes them, on the CPU. Equal media have an equal ``digest``."""

    digest: bytes
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By kind: what each medium is written as in the prompt."""
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.inputs.values() if isinstance(value, torch.Tensor))


class MediaProcessor:
    """``modalities`` beside text. Its methods block (they decode): call them in a thread."""

    def __init__(self, processor: Any, settings: MediaSettings) -> None:
        self._processor = processor
        self._settings = settings
        self.tokenizer = processor.tokenizer
        """With what the processor added to it: it is to be the model's."""
        image = getattr(processor, "image_processor", None)
        self._is_qwen = hasattr(image, "merge_size") and hasattr(image, "temporal_patch_size")
        self.tokens = {
            kind: token
            for kind, part in (("image", image), ("video", _video(processor)), ("audio", _audio(processor)))
            if part is not None and isinstance(token := _word(processor, kind), str)
        }
        self.modalities = tuple(self.tokens)
        self._frames_are_images = "video" in self.tokens and "pixel_values_videos" not in processor.model_input_names
        """Whether the model takes a video's frames among the images, in order, as InternVL does."""
        # Gemma 3's word for an image is what begins one.
        own = {kind: getattr(self.tokenizer, f"{kind}_token", None) or token for kind, token in self.tokens.items()}
        self.places = own
        """By kind: the token that stands in a prompt, written out, wherever the model sees or hears something."""
        if self._frames_are_images:
            self.places["video"] = self.tokens["image"]
        self._recent: Recent[Prepared] = Recent(_KEPT_BYTES, lambda prepared: prepared.nbytes)

    def expansion(self, media: Sequence[Media]) -> Expansion:
        """Raises `InvalidRequest` for media that can't be decoded or that the model can't take."""
        return Expansion(self.tokens, self.prepared(media).texts)

    def prepared(self, media: Sequence[Media]) -> Prepared:
        """Raises `InvalidRequest`."""
        digest = digest_of(media)

        def make() -> Prepared:
            decoded = decode(media, self._settings, is_qwen=self._is_qwen)
            try:
                return self._prepared(digest, [medium.kind for medium in media], decoded)
            except _FAILURES as error:
                raise invalid(f"The model's processor can't take the media: {type(error).__name__}: {error}") from error

        return self._recent.get(digest, make)

    def _prepared(self, digest: bytes, kinds: Sequence[str], decoded: Decoded) -> Prepared:
        processor = self._processor
        merged = processor._merge_kwargs(
            processor.valid_processor_kwargs,
            tokenizer_init_kwargs=getattr(processor.tokenizer, "init_kwargs", {}),
            return_tensors="pt",
        )
        texts: dict[str, tuple[str, ...]] = {}
        inputs: dict[str, Any] = {}
        if decoded.images:
            options = merged["images_kwargs"]
            options |= cutting(self._settings, processor.image_processor)
            made, written = self._images(decoded, options)
            inputs.update(made)
            texts["image"] = tuple(written)
        if decoded.videos:
            made, written = self._videos(decoded, merged["videos_kwargs"])
            inputs.update(made)
            texts["video"] = tuple(written)
        if decoded.audios:
            made, written = self._audios(decoded, merged["audio_kwargs"])
            inputs.update(made)
            texts["audio"] = tuple(written)
        for kind, each in texts.items():
            if not all(each):
                raise invalid(f"An {kind} is too small for the model to see or hear anything in it.")
        if self._frames_are_images and "pixel_values_videos" in inputs:
            inputs["pixel_values"] = _in_order(kinds, inputs)
            del inputs["pixel_values_videos"]
        unused = {*processor.unused_input_names, "video_metadata", "num_crops"}
        return Prepared(digest, texts, {name: value for name, value in inputs.items() if name not in unused})

    def _images(self, decoded: Decoded, options: dict[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
        processor, images = self._processor, list(decoded.images)
        if _writes(processor, "image"):
            made, written = processor._process_images(images, **options)
            return made, written
        # Those of transformers 5.12 for Gemma 3, InternVL, LLaVA-NeXT and PaliGemma, too, write into a text only.
        word, own = self.tokens["image"], {"add_special_tokens": False, "padding": False}
        texts = []
        for image in images:
            made = processor(text=[word], images=[image], images_kwargs=options, text_kwargs=own)
            text = self.tokenizer.decode(made["input_ids"][0], clean_up_tokenization_spaces=False)
            is_framed = not isinstance(processor, transformers.PaliGemmaProcessor)  # which ends a text by itself
            texts.append(text if is_framed else word * text.count(word))
        return processor.image_processor(images, **options), texts

    def _audios(self, decoded: Decoded, options: dict[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
        processor, audios = self._processor, list(decoded.audios)
        most = getattr(_audio(processor), "n_samples", None)  # Whisper's feature extractor cuts off the rest
        if most is not None and options.get("truncation") is not False and max(map(len, audios)) > most:
            seconds = most / self._settings.audio_sampling_rate
            raise too_large(f"An audio is longer than the {seconds:g} s that this model hears.", "Send it in parts.")
        rate = {"sampling_rate": self._settings.audio_sampling_rate}
        if _writes(processor, "audio"):
            made, written = processor._process_audio(audios, **options, **rate)
            return made, written
        # Qwen2-Audio's in transformers 5.12, which SGLang 0.5.17 wants, writes audios into a text of its own only.
        token = processor.audio_token
        made = processor(text=[token] * len(audios), audio=audios, padding=True, return_tensors="pt", **rate)
        ids = made.pop("input_ids")
        del made["attention_mask"]
        return made, [token * int(count) for count in (ids == processor.audio_token_id).sum(dim=1)]

    def _videos(self, decoded: Decoded, options: dict[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
        """Frames are sampled already, so the processor must not choose among them again."""
        settings, processor = self._settings, self._processor
        metadata = [
            {
                # LLaMA-Factory's way to tell Qwen3-VL when a frame was: numbers as if at ``video_fps``.
                "fps": settings.video_fps,
                "duration": video.duration_s,
                "total_num_frames": len(video.frames),
                "frames_indices": [index / video.source_fps * settings.video_fps for index in video.indices],
            }
            for video in decoded.videos
        ]
        more = {**options, "do_sample_frames": False, "video_metadata": metadata, "return_metadata": True}
        made, written = processor._process_videos([list(video.frames) for video in decoded.videos], **more)
        if "second_per_grid_ts" in made:
            grid_frames = getattr(_video(processor), "temporal_patch_size", 2)
            made["second_per_grid_ts"] = [grid_frames / video.fps for video in decoded.videos]
        return made, written

    def token_types(self, ids: Sequence[int]) -> torch.Tensor:
        """``[1, tokens]``: 0 text, 1 image, 2 video, 3 audio."""
        return torch.tensor(self._processor.create_mm_token_type_ids([list(ids)]))


def _in_order(kinds: Sequence[str], inputs: Mapping[str, Any]) -> torch.Tensor:
    """Pictures ``[pictures, channels, height, width]``: an image's tiles, a video's frames."""
    tiles = [int(count) for count in inputs.get("num_patches", ())]
    images = iter(torch.as_tensor(inputs["pixel_values"]).split(tiles) if tiles else ())
    videos = iter(inputs["pixel_values_videos"])
    return torch.cat([torch.as_tensor(next(images if kind == "image" else videos)) for kind in kinds])


def check_settings(processor: Any, settings: MediaSettings) -> None:
    """Raises `ConfigurationError` for a setting that this model can't honour. ``processor``: transformers' own."""
    if settings.use_audio_in_video:
        raise ConfigurationError("use_audio_in_video: no model that is served takes a video's sound.")
    image = getattr(processor, "image_processor", None)
    for name, attribute in (("image_do_pan_and_scan", "do_pan_and_scan"), ("crop_to_patches", "crop_to_patches")):
        if getattr(settings, name) and not hasattr(image, attribute):
            raise ConfigurationError(f"{name}: this model's processor does not cut images.", hint="Leave it out.")
    rate = getattr(_audio(processor), "sampling_rate", None)
    if rate is not None and rate != settings.audio_sampling_rate:
        raise ConfigurationError(
            f"audio_sampling_rate is {settings.audio_sampling_rate} Hz, and this model hears {rate} Hz.",
            hint=f"Set audio_sampling_rate to {rate}.",
        )


def cutting(settings: MediaSettings, image: Any) -> dict[str, Any]:
    """What a model's processor is told of cutting images. ``image``: its image processor.

    A processor of InternVL would cut by itself, whatever its image processor says: LLaMA-Factory asks the latter."""
    told = dict(_PAN_AND_SCAN) if settings.image_do_pan_and_scan else {}
    if settings.crop_to_patches:
        return told | _TILES
    own = getattr(image, "crop_to_patches", None)
    return told if own is None else {**told, "crop_to_patches": own}


def load_processor(
    folder: Path, tokenizer: Any, settings: MediaSettings, *, trust_remote_code: bool
) -> MediaProcessor | None:
    """A `MediaProcessor` for the model in ``folder``; None (and a warning that says why) where its processor can't be
    made here, so that the model serves texts at least. Raises `ConfigurationError` (`check_settings`)."""
    try:
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ImportError, AttributeError, OSError, ValueError, TypeError):
            processor = _assembled(folder, tokenizer)
        if not hasattr(processor, "_process_images"):
            raise ValueError(f"{type(processor).__name__} is no processor of transformers 5")
        made = MediaProcessor(processor, settings)
    except (ImportError, AttributeError, OSError, ValueError, TypeError, KeyError) as error:
        log.warning("The model's processor can't be made, so that it takes texts only: %s", error)
        return None
    if not made.modalities:
        return None
    check_settings(processor, settings)
    if source := getattr(processor, "chat_template", None):
        made.tokenizer.chat_template = source
    return made


def _assembled(folder: Path, tokenizer: Any) -> Any:
    """The processor out of its parts, for want of torchvision: without that transformers makes no processor that has a
    part for videos. Qwen's take a video's frames as images (`FramesAsImages`); others then take no video."""
    settings, _ = transformers.ProcessorMixin.get_processor_dict(folder)
    name = settings.get("processor_class") or _processor_class(folder)
    base = getattr(transformers, name or "", None)
    if base is None:
        raise ValueError(f"transformers knows no processor {name!r}")

    class Assembled(base):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    parts: dict[str, Any] = {"tokenizer": tokenizer}
    for part in base.get_attributes():
        if part == "image_processor":
            parts[part] = transformers.AutoImageProcessor.from_pretrained(folder)
        elif part == "feature_extractor":
            parts[part] = transformers.AutoFeatureExtractor.from_pretrained(folder)
        elif part == "video_processor":
            parts[part] = FramesAsImages.of(folder, parts["image_processor"])
    others = set(inspect.signature(base.__init__).parameters) - {"self", "args", "kwargs"} - parts.keys()
    options = {key: value for key, value in settings.items() if key in others}
    Assembled.__name__ = base.__name__
    return Assembled(**parts, **options)


def _processor_class(folder: Path) -> str | None:
    """What older checkpoints say in the image processor's file."""
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    found = settings.get("processor_class")
    return found if isinstance(found, str) else None


def _video(processor: Any) -> Any:
    return getattr(processor, "video_processor", None)


def _audio(processor: Any) -> Any:
    return getattr(processor, "audio_processor", None) or getattr(processor, "feature_extractor", None)


def _writes(processor: Any, kind: str) -> bool:
    """Whether it tells what a medium is written as. In transformers 5.12, which SGLang 0.5.17 wants, LLaVA-NeXT's,
    Gemma 3's, InternVL's and PaliGemma's don't of images, and InternVL's not of videos."""
    own, plain = type(processor), transformers.ProcessorMixin
    steps = (f"_process_{kind}" + ("" if kind == "audio" else "s"), f"replace_{kind}_token")
    return any(getattr(own, step) is not getattr(plain, step) for step in steps)


def _word(processor: Any, kind: str) -> Any:
    """What the model's chat template writes for a medium; None for a kind that can't be told from others here."""
    if _writes(processor, kind) or kind == "audio":
        return getattr(processor, f"{kind}_token", None)
    if kind == "image":
        return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    log.warning(
        "With transformers %s %s takes no videos: it needs a later one.",
        transformers.__version__,
        type(processor).__name__,
    )
    return None
