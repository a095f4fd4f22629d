"""All media of a request, decoded in their order; the last few results are kept, since n choices and the prompt's own
rendering need the same ones."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tokenfleet.engines.base import Media
from tokenfleet.engines.media.audios import decode_audio
from tokenfleet.engines.media.failures import Deadline, too_large
from tokenfleet.engines.media.images import decode_image
from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.engines.media.videos import Video, decode_video

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Each kind in its own order of appearance."""

    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()
    audios: tuple[np.ndarray[Any, Any], ...] = ()


def decode(media: Sequence[Media], settings: MediaSettings, *, is_qwen: bool = False) -> Decoded:
    """Blocks for as long as it takes: call it in a thread. Raises `InvalidRequest` (``media_too_large``,
    ``invalid_media``)."""
    for medium in media:
        if len(medium.data) > settings.media_max_bytes:
            raise too_large(
                f"The {medium.kind} has {len(medium.data)} bytes; up to {settings.media_max_bytes} are read.",
                "Send a smaller one.",
            )
    deadline = Deadline(settings.media_timeout_s)
    images: list[Image] = []
    videos: list[Video] = []
    audios: list[np.ndarray[Any, Any]] = []
    for medium in media:
        match medium.kind:
            case "image":
                images.append(decode_image(medium.data, settings, is_qwen=is_qwen))
            case "video":
                videos.append(decode_video(medium.data, settings, deadline, is_qwen=is_qwen))
            case "audio":
                audios.append(decode_audio(medium.data, settings, deadline))
        deadline.check()
    return Decoded(tuple(images), tuple(videos), tuple(audios))


def digest_of(media: Sequence[Media]) -> bytes:
    """Equal for equal media in equal order."""
    total = hashlib.sha256()
    for medium in media:
        total.update(medium.kind.encode() + hashlib.sha256(medium.data).digest())
    return total.digest()


class Recent(Generic[Value]):
    """The last few results by digest, up to ``most_bytes``. Who asks for one that is being made waits for it.

    ``most_at_once`` bounds memory: each decoding may take as much as `MediaSettings` allows."""

    def __init__(self, most_bytes: int, size_of: Callable[[Value], int], most_at_once: int = 2) -> None:
        self._most_bytes = most_bytes
        self._size_of = size_of
        self._made: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[bytes, threading.Lock] = {}
        self._places = threading.BoundedSemaphore(most_at_once)

    def get(self, key: bytes, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made if need be. Raises what ``make`` raises."""
        with self._lock:
            own = self._making.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._made:
                    self._made.move_to_end(key)
                    return self._made[key]
            try:
                with self._places:
                    value = make()
                with self._lock:
                    self._keep(key, value)
                return value
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def _keep(self, key: bytes, value: Value) -> None:
        self._made[key] = value
        while sum(map(self._size_of, self._made.values())) > self._most_bytes:
            self._made.popitem(last=False)
