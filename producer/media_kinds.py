"""What a file is by its first bytes: enough to refuse a wrong one at once, without decoding anything."""

from __future__ import annotations

from typing import Literal

from tokenfleet.wire.errors import InvalidRequest

Kind = Literal["image", "video", "audio"]

# (offset, bytes) of each format; all of them must be there.
_Signs = tuple[tuple[int, bytes], ...]
_FORMATS: dict[Kind, dict[str, tuple[_Signs, ...]]] = {
    "image": {
        "PNG": (((0, b"\x89PNG\r\n\x1a\n"),),),
        "JPEG": (((0, b"\xff\xd8\xff"),),),
        "GIF": (((0, b"GIF87a"),), ((0, b"GIF89a"),)),
        "WebP": (((0, b"RIFF"), (8, b"WEBP")),),
        "BMP": (((0, b"BM"),),),
    },
    "video": {
        "MP4": (((4, b"ftyp"),),),
        "WebM": (((0, b"\x1a\x45\xdf\xa3"),),),
        "AVI": (((0, b"RIFF"), (8, b"AVI ")),),
        "GIF": (((0, b"GIF87a"),), ((0, b"GIF89a"),)),
        "Ogg": (((0, b"OggS"),),),
        "FLV": (((0, b"FLV"),),),
        "MPEG": (((0, b"\x00\x00\x01\xba"),), ((0, b"\x00\x00\x01\xb3"),), ((0, b"\x47"), (188, b"\x47"))),
    },
    "audio": {
        "WAV": (((0, b"RIFF"), (8, b"WAVE")),),
        "MP3": (((0, b"ID3"),), ((0, b"\xff\xfb"),), ((0, b"\xff\xf3"),), ((0, b"\xff\xf2"),), ((0, b"\xff\xfa"),)),
        "FLAC": (((0, b"fLaC"),),),
        "Ogg": (((0, b"OggS"),),),
        "M4A": (((4, b"ftyp"),),),
        "AAC": (((0, b"\xff\xf1"),), ((0, b"\xff\xf9"),)),
        "AIFF": (((0, b"FORM"), (8, b"AIF")),),
        "WebM": (((0, b"\x1a\x45\xdf\xa3"),),),
    },
}  # fmt: skip


def format_of(kind: Kind, data: bytes) -> str | None:
    """The name of the format, None for one that is not known as a ``kind``."""
    for name, variants in _FORMATS[kind].items():
        if any(all(data[at : at + len(sign)] == sign for at, sign in signs) for signs in variants):
            return name
    return None


def check_kind(kind: Kind, data: bytes, place: str) -> None:
    """Raises `InvalidRequest` (``unsupported_media``); ``place`` names the medium."""
    if not data:
        raise InvalidRequest(f"{place}: it is empty.", code="invalid_media", param=place)
    if format_of(kind, data) is None:
        raise InvalidRequest(
            f"{place}: these bytes are no {kind} of a known format.",
            code="unsupported_media",
            hint=f"Known are {', '.join(_FORMATS[kind])}.",
            param=place,
        )
