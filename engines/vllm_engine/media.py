"""Media in vLLM: decoded here, under our limits and sizes, then processed and written into the prompt by vLLM."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from tokenfleet.engines.base import Media
from tokenfleet.engines.families import KINDS, cell_of, kinds_given
from tokenfleet.engines.folders import architectures, has_processor
from tokenfleet.engines.media import Decoded, MediaSettings, Video, decode
from tokenfleet.engines.media.decoding import Recent, digest_of
from tokenfleet.engines.media.failures import invalid
from tokenfleet.engines.media.processing import check_settings, cutting
from tokenfleet.engines.templates.expansion import Expansion
from tokenfleet.engines.vllm_engine import compat
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest
from tokenfleet.wire.support import Refusal

_KEPT_BYTES = 128 << 20


class VllmMedia:
    """For one started `AsyncLLM`. ``modalities``: what the model takes beside text."""

    def __init__(self, engine: Any, settings: MediaSettings) -> None:
        """Raises `ConfigurationError` for settings that the model can't honour."""
        self._engine = engine
        self._settings = settings
        self._events: asyncio.AbstractEventLoop | None = None
        info = engine.renderer.get_mm_processor().info
        processor = info.get_hf_processor()
        check_settings(processor, settings)
        self._cuts = cutting(settings, getattr(processor, "image_processor", None))
        limits = info.supported_mm_limits
        offered = (kind for kind in KINDS if kind in limits)
        self.modalities = kinds_given("vllm", engine.model_config.architectures, offered)
        tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in self.modalities}
        self._ids = {kind: processor.tokenizer.convert_tokens_to_ids(token) for kind, token in tokens.items() if token}
        vision = getattr(engine.model_config.hf_config, "vision_config", None)
        self._is_qwen = hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size")
        self._grid_frames = getattr(getattr(processor, "video_processor", None), "temporal_patch_size", 2)
        self._recent: Recent[Decoded] = Recent(_KEPT_BYTES, _size_of)

    def serve(self) -> None:
        """Called on the event loop that the engine runs on."""
        self._events = asyncio.get_running_loop()

    def expansion(self, media: Sequence[Media]) -> Expansion:
        """vLLM writes out a model's token by itself; it must stand once for each medium."""
        return Expansion()

    def tokens_of(self, ids: Sequence[int], media: Sequence[Media]) -> int:
        """How many tokens the prompt has with its media written out. Called in a thread, never on the event loop.

        Raises `InvalidRequest`, also for the model's own token where no medium stands: vLLM would put one there."""
        for kind, token in self._ids.items():
            given = sum(medium.kind == kind for medium in media)
            if ids.count(token) > given:
                raise invalid(
                    f"The prompt has {ids.count(token)} places for {given} {kind} parts.",
                    f"Don't write the model's own token for {kind}s in a text.",
                )
        assert self._events is not None
        return len(asyncio.run_coroutine_threadsafe(self.prompt(ids, media), self._events).result()["prompt_token_ids"])

    async def prompt(self, ids: Sequence[int], media: Sequence[Media]) -> Any:
        """vLLM's engine input. Raises `InvalidRequest` for media that can't be decoded or that the model can't take."""
        decoded = await asyncio.to_thread(self._decoded, media)
        renderer = self._engine.renderer
        more: dict[str, Any] = {}
        if "skip_mm_cache" in inspect.signature(renderer.render_cmpl_async).parameters:
            # That cache leaves out what the core has seen before, in the order of rendering, which is not that of
            # the requests' arrival there.
            more["skip_mm_cache"] = True
        prompt = {"prompt_token_ids": list(ids), "multi_modal_data": _data(decoded, self._settings)}
        if decoded.images and self._cuts:
            prompt["mm_processor_kwargs"] = dict(self._cuts)
        # The last for a prompt that has no place for a medium.
        errors: tuple[type[Exception], ...] = (*compat.request_errors(), AssertionError)
        try:
            parsed = compat.parsed_prompt(self._engine.model_config, prompt)
            (made,) = await renderer.render_cmpl_async([parsed], renderer.default_cmpl_tok_params, **more)
        except errors as error:
            raise InvalidRequest(
                f"vLLM can't take the media: {error}", code="invalid_media", param="messages",
                hint="Does the model's template have a place for each?",
            ) from error  # fmt: skip
        compat.place_videos(made, [self._grid_frames / video.fps for video in decoded.videos])
        return made

    def _decoded(self, media: Sequence[Media]) -> Decoded:
        return self._recent.get(digest_of(media), lambda: decode(media, self._settings, is_qwen=self._is_qwen))


def check_folder(folder: Path, label: str, settings: MediaSettings, *, trust_remote_code: bool) -> None:
    """Raises `ConfigurationError` for a model that vLLM doesn't compute as it is meant, and for settings that the one
    in ``folder`` can't honour, before vLLM takes half a minute to start; `VllmMedia` asks again for these, of the
    processor that vLLM uses."""
    if isinstance(why := cell_of("vllm", architectures(folder)), Refusal):
        raise ConfigurationError(
            f"vLLM can't serve {label!r}: {why.reason}",
            hint=f"Serve it with transformers or sglang, where these have it. See {why.source}",
        )
    if not has_processor(folder):
        return
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, AttributeError, OSError, ValueError, TypeError, KeyError):
        return  # vLLM may have one of its own
    check_settings(processor, settings)


def _data(decoded: Decoded, settings: MediaSettings) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if decoded.images:
        data["image"] = list(decoded.images)
    if decoded.videos:
        data["video"] = [_video(video) for video in decoded.videos]
    if decoded.audios:
        data["audio"] = [(samples, settings.audio_sampling_rate) for samples in decoded.audios]
    return data


def _video(video: Video) -> tuple[Any, dict[str, Any]]:
    """Frames ``[frames, height, width, 3]`` and what vLLM is to know of them: that none is to be left out, their rate
    (Qwen2.5-VL's positions follow from it), and when each was (Qwen3-VL is told)."""
    import numpy as np

    return np.stack([np.asarray(frame) for frame in video.frames]), {
        "fps": video.fps,
        "duration": video.duration_s,
        "total_num_frames": len(video.frames),
        "frames_indices": [index / video.source_fps * video.fps for index in video.indices],
        "video_backend": "tokenfleet",
        "do_sample_frames": False,
    }


def _size_of(decoded: Decoded) -> int:
    frames = [*decoded.images, *(frame for video in decoded.videos for frame in video.frames)]
    return sum(4 * frame.width * frame.height for frame in frames) + sum(sound.nbytes for sound in decoded.audios)
