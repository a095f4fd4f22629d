"""One audio as samples: the mean of its channels, at the rate the model hears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        _check_channels(stream.codec_context.channels)
        seconds = seconds_of(container, stream)
        if seconds is not None and seconds > settings.media_max_seconds:
            raise _too_long(settings)
        most = int(settings.media_max_seconds * settings.audio_sampling_rate)
        pieces: list[np.ndarray[Any, Any]] = []
        samples = 0
        for made in _resampled(container.decode(stream), settings.audio_sampling_rate):
            deadline.check()
            piece = made.to_ndarray().mean(axis=0, dtype=np.float32)
            pieces.append(piece)
            samples += len(piece)
            if samples > most:
                raise _too_long(settings)
    if not samples:
        raise invalid("The audio has no samples.")
    return np.concatenate(pieces)


def _resampled(frames: Iterable[Any], rate: int) -> Iterator[Any]:
    """Frames of float32 at ``rate``. Channels and rate may change in the midst of a file, as where two were joined."""
    import av

    resampler, setup = None, None
    for frame in frames:
        if setup != (setup := (frame.format.name, frame.layout.name, frame.sample_rate)):
            _check_channels(len(frame.layout.channels))
            if resampler is not None:
                yield from resampler.resample(None)  # what it still holds
            resampler = av.AudioResampler(format="fltp", rate=rate)
        assert resampler is not None
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _check_channels(count: int) -> None:
    if count > _MOST_CHANNELS:
        raise invalid(f"The audio has {count} channels.", "Send one or two.")


def _too_long(settings: MediaSettings) -> Exception:
    return too_large(
        f"The audio is longer than the {settings.media_max_seconds:g} s that are read.", "Send a shorter one."
    )
