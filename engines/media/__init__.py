"""Images, videos and audios: from bytes that anybody may have sent to what a model's processor takes, under limits.

    decode(media, settings)  ->  Decoded(images, videos, audios)

Nothing is decoded before its header said how large it will be. Resizing and sampling are LLaMA-Factory 0.9.5's, so a
model sees what it saw in training. Pillow and PyAV are imported only once there is something to decode.
"""

from __future__ import annotations

from tokenfleet.engines.media.decoding import Decoded, decode
from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.engines.media.videos import Video

__all__ = ["Decoded", "MediaSettings", "Video", "decode"]
