"""One video as the frames a model is to see: sampled and scaled as LLaMA-Factory does, one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenfleet.engines.media.containers import opened, seconds_of
from tokenfleet.engines.media.failures import Deadline, invalid, too_large
from tokenfleet.engines.media.images import resized
from tokenfleet.engines.media.settings import MediaSettings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Video:
    """Frames in order. ``indices`` are their numbers in the file, ``fps`` the rate they were taken at."""

    frames: tuple[Image, ...]
    indices: tuple[int, ...]
    source_fps: float
    fps: float
    duration_s: float


def decode_video(data: bytes, settings: MediaSettings, deadline: Deadline, *, is_qwen: bool = False) -> Video:
    """``is_qwen``: an even number of frames, the last one twice if need be.

    Raises `InvalidRequest` (``media_too_large``, ``invalid_media``)."""
    with opened(data, "video") as (container, stream):
        _check_size(stream.codec_context.width, stream.codec_context.height, settings)
        # FFmpeg itself then refuses a frame that turns out larger than its header said.
        stream.codec_context.options = {"max_pixels": str(settings.media_max_pixels)}
        seconds = seconds_of(container, stream)
        if seconds is not None and seconds > settings.media_max_seconds:
            raise _too_long(seconds, settings)
        # From here on only what the stream itself says, as LLaMA-Factory has it.
        seconds = float(stream.duration * stream.time_base) if stream.duration is not None else None
        wanted = sample_indices(stream.frames, seconds, settings)
        frames, indices = _frames(container, stream, wanted, settings, deadline, is_qwen=is_qwen)
        source_fps = float(stream.average_rate or settings.video_fps)
    if not frames:
        raise invalid("The video has no frames.")
    duration_s = seconds or len(frames) / settings.video_fps
    if is_qwen and len(frames) % 2:
        frames.append(frames[-1])
        indices.append(indices[-1])
    return Video(
        tuple(frames),
        tuple(indices),
        source_fps,
        fps=len(wanted) / seconds if seconds else settings.video_fps,
        duration_s=duration_s,
    )


def sample_indices(total: int, seconds: float | None, settings: MediaSettings) -> list[int]:
    """Numbers of the frames to take, ascending, possibly repeated.

    ``total`` 0: the header doesn't say (Matroska, streams); then the first ``video_maxlen`` ones."""
    if total <= 0:
        return list(range(settings.video_maxlen))
    count = max(1, math.floor((seconds or 0.0) * settings.video_fps))
    count = min(total, settings.video_maxlen, count)
    # numpy's linspace(0, total - 1, count), cut to integers.
    return [0] if count == 1 else [int(place * ((total - 1) / (count - 1))) for place in range(count - 1)] + [total - 1]


def _frames(
    container: Any, stream: Any, wanted: list[int], settings: MediaSettings, deadline: Deadline, *, is_qwen: bool
) -> tuple[list[Image], list[int]]:
    frames: list[Image] = []
    indices: list[int] = []
    left = set(wanted)
    size: tuple[int, int] | None = None
    for number, frame in enumerate(container.decode(stream)):
        deadline.check()
        if number >= settings.media_max_frames:
            raise too_large(
                f"The video has more than {settings.media_max_frames} frames before those that are needed.",
                "Send it shorter, or at a lower frame rate.",
            )
        if number in left:
            _check_size(frame.width, frame.height, settings)
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise invalid("The video's frames change their size on the way.", "Code it with one size.")
            image = frame.to_image()
            frames.append(resized(image, settings.video_max_pixels, settings.video_min_pixels, is_qwen=is_qwen))
            indices.append(number)
            left.discard(number)
            if not left:
                break
    return frames, indices


def _check_size(width: int, height: int, settings: MediaSettings) -> None:
    if width * height > settings.media_max_pixels:
        raise too_large(
            f"The video's frames have {width} × {height} pixels; {settings.media_max_pixels} in all are read.",
            f"Scale it down: the model sees {settings.video_max_pixels} of each at most.",
        )


def _too_long(seconds: float, settings: MediaSettings) -> Exception:
    return too_large(
        f"The video is {seconds:.0f} s long; up to {settings.media_max_seconds:g} s are read.", "Send a shorter one."
    )
