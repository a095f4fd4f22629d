"""One audio as samples: the mean of its channels, at the rate the model hears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenfleet.engines.media.containers import opened, seconds_of
from tokenfleet.engines.media.failures import Deadline, invalid, too_large
from tokenfleet.engines.media.settings import MediaSettings

if TYPE_CHECKING:
    import numpy as np

_MOST_CHANNELS = 8


def decode_audio(data: bytes, settings: MediaSettings, deadline: Deadline) -> np.ndarray[Any, Any]:
    """float32 in [-1, 1], ``[samples]``. Raises `InvalidRequest` (``media_too_large``, ``invalid_media``)."""
    import numpy as np

    with opened(data, "audio") as (container, stream):
        import av

        if stream.codec_context.channels > _MOST_CHANNELS:
            raise invalid(f"The audio has {stream.codec_context.channels} channels.", "Send one or two.")
        seconds = seconds_of(container, stream)
        if seconds is not None and seconds > settings.media_max_seconds:
            raise _too_long(settings)
        resampler = av.AudioResampler(format="fltp", rate=settings.audio_sampling_rate)
        most = int(settings.media_max_seconds * settings.audio_sampling_rate)
        pieces: list[np.ndarray[Any, Any]] = []
        samples = 0
        for frame in _with_end(container.decode(stream)):
            deadline.check()
            for made in resampler.resample(frame):
                piece = made.to_ndarray().mean(axis=0, dtype=np.float32)
                pieces.append(piece)
                samples += len(piece)
            if samples > most:
                raise _too_long(settings)
    if not samples:
        raise invalid("The audio has no samples.")
    return np.concatenate(pieces)


def _with_end(frames: Any) -> Any:
    """The frames, then None, which makes a resampler give what it still holds."""
    yield from frames
    yield None


def _too_long(settings: MediaSettings) -> Exception:
    return too_large(
        f"The audio is longer than the {settings.media_max_seconds:g} s that are read.", "Send a shorter one."
    )
