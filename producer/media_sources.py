"""The bytes of one image, video or audio, in whatever form a caller has it.

Words are treated by who says them: an argument of a call (``images=["cat.png"]``) may name a file on this machine, text
inside a message never does, since it may be a stranger's.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from tokenfleet.producer.media_kinds import Kind, check_kind
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.media import MediaSettings, too_large

SAMPLING_RATE_HZ = 16_000
"""Of an array of samples that comes without one; LLaMA-Factory's default."""


def bytes_of(kind: Kind, source: Any, place: str, limits: MediaSettings, *, may_be_path: bool) -> bytes:
    """The file's bytes: of a path, bytes, a data URL, a file object, a PIL image, an array of samples (or a pair of
    one and its rate in Hz), or LLaMA-Factory's ``{"path": …}``/``{"bytes": …}``. ``place`` names it in errors.

    Raises `InvalidRequest`: ``unsupported_media``, ``invalid_media``, ``media_too_large``, ``url_refused``."""
    data = _read(kind, source, place, limits, may_be_path)
    if len(data) > limits.limit_bytes:
        raise too_large(limits)
    check_kind(kind, data, place)
    return data


def _read(kind: Kind, source: Any, place: str, limits: MediaSettings, may_be_path: bool) -> bytes:
    match source:
        case bytes() | bytearray() | memoryview():
            return bytes(source)
        case str() if source[:5].lower() == "data:":
            return of_data_url(source, place, limits)
        case str() if source[:8].lower().startswith(("http://", "https://")):
            raise InvalidRequest(
                f"{place}: URLs are not fetched.",
                code="url_refused",
                hint="Send the content itself (a file, bytes, or a data URL).",
                param=place,
            )
        case str() if not may_be_path:
            raise InvalidRequest(
                f"{place}: a data URL is needed.", code="invalid_media", hint="data:image/png;base64,…", param=place
            )
        case str() | os.PathLike():
            return _of_file(Path(source), place, limits)
        case Mapping() if source.get("bytes") is not None:
            return _read(kind, source["bytes"], place, limits, False)
        case Mapping() if source.get("path") is not None and may_be_path:
            return _read(kind, source["path"], place, limits, True)
    if callable(getattr(source, "read", None)):
        return _of_reader(source, place, limits)
    if kind == "image" and callable(getattr(source, "save", None)):
        return _of_pil(source)
    if kind == "audio" and (samples := _samples(source)) is not None:
        return wav(*samples)
    raise InvalidRequest(
        f"{place}: a {type(source).__name__} is no {kind}.",
        code="unsupported_media",
        hint="Give a path, bytes, a data URL, a file object" + (", or a PIL image." if kind == "image" else "."),
        param=place,
    )


def of_data_url(url: str, place: str, limits: MediaSettings) -> bytes:
    """Its size is checked before it is decoded."""
    head, comma, body = url.partition(",")
    if not comma:
        raise InvalidRequest(f"{place}: a data URL has a comma before its content.", code="invalid_media", param=place)
    if head.lower().endswith(";base64"):
        return of_base64(body, place, limits)
    if len(body) > 3 * limits.limit_bytes:
        raise too_large(limits)
    return unquote_to_bytes(body)


def of_base64(text: str, place: str, limits: MediaSettings) -> bytes:
    if len(text) * 3 // 4 > limits.limit_bytes + 2:
        raise too_large(limits)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{place}: this is not valid base64.", code="invalid_media", param=place) from error


def _of_file(path: Path, place: str, limits: MediaSettings) -> bytes:
    try:
        with path.open("rb") as file:
            return _of_reader(file, place, limits)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise InvalidRequest(f"{place}: {path} can't be read: {reason}.", code="invalid_media", param=place) from error


def _of_reader(file: Any, place: str, limits: MediaSettings) -> bytes:
    data = file.read(limits.limit_bytes + 1)
    if not isinstance(data, bytes):
        raise InvalidRequest(f"{place}: the file must be opened as binary.", code="invalid_media", param=place)
    return data


def _of_pil(image: Any) -> bytes:
    """A PIL image, losslessly. Its class says how: Pillow itself is not needed here."""
    out = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I") else image.convert("RGB")).save(out, "PNG")
    return out.getvalue()


def _samples(source: Any) -> tuple[Any, int] | None:
    """(one-dimensional array, rate in Hz), if it is that."""
    rate = SAMPLING_RATE_HZ
    if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[1], int):
        source, rate = source
    return (source, rate) if hasattr(source, "astype") and getattr(source, "ndim", 0) == 1 else None


def wav(samples: Any, rate_hz: int) -> bytes:
    """Samples of one channel as a WAV file: 32-bit floats, as they are; integers scaled to [-1, 1)."""
    if samples.dtype.kind in "iu":
        top = 1 << (8 * samples.dtype.itemsize - 1)
        samples = samples.astype("<f8") / top - (1.0 if samples.dtype.kind == "u" else 0.0)
    body = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate_hz, 4 * rate_hz, 4, 32)
    fact = struct.pack("<I", len(body) // 4)
    chunks = b"".join(
        name + struct.pack("<I", len(content)) + content
        for name, content in ((b"fmt ", form), (b"fact", fact), (b"data", body))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
