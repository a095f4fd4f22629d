"""How a served model's media are resized and sampled (LLaMA-Factory's names and defaults), and what is too much."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MediaSettings(BaseModel):
    """A part of an engine's options: each inherits it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_max_pixels: int = Field(768 * 768, ge=1)
    """Larger images are scaled down to this, sides in proportion."""
    image_min_pixels: int = Field(32 * 32, ge=1)
    image_do_pan_and_scan: bool = False
    """Gemma 3: add crops of an image that is much longer than wide."""
    crop_to_patches: bool = False
    """InternVL: cut an image into up to 12 tiles."""
    video_max_pixels: int = Field(256 * 256, ge=1)
    """Of each frame."""
    video_min_pixels: int = Field(16 * 16, ge=1)
    video_fps: float = Field(2.0, gt=0)
    """Frames taken of each second."""
    video_maxlen: int = Field(128, ge=1)
    """The most frames taken of a video."""
    use_audio_in_video: bool = False
    audio_sampling_rate: int = Field(16000, ge=1000, le=192000)
    """Hz; audios are resampled to it."""

    media_max_bytes: int = Field(128 << 20, ge=1)
    """The largest file; of each medium, before decoding."""
    media_max_pixels: int = Field(40_000_000, ge=1)
    """The largest image or frame as it is stored, by its header. Decoding takes about 4 bytes a pixel."""
    media_max_seconds: float = Field(3600.0, gt=0)
    """The longest video or audio."""
    media_max_frames: int = Field(120_000, ge=1)
    """The most frames that are decoded of a video, taken or not."""
    media_timeout_s: float = Field(120.0, gt=0)
    """For decoding all media of one request."""

    @model_validator(mode="after")
    def _least_is_least(self) -> Self:
        for kind in ("image", "video"):
            if getattr(self, f"{kind}_min_pixels") > getattr(self, f"{kind}_max_pixels"):
                raise ValueError(f"{kind}_min_pixels is larger than {kind}_max_pixels")
        return self
