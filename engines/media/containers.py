"""Audio and video files, opened by what they are and not by what FFmpeg would guess.

FFmpeg knows formats that name other files and addresses (playlists, concat scripts). Which reader is used is decided
here, by the first bytes, from a short list of plain containers; what it may decode with is a list too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from tokenfleet.engines.media.failures import invalid
from tokenfleet.wire.errors import ConfigurationError

if TYPE_CHECKING:
    from av.container import InputContainer

VIDEO_CODECS = frozenset(
    {
        "h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "h263", "flv1", "mjpeg", "gif",
        "theora", "msmpeg4v3", "prores", "ffv1", "png",
    }
)  # fmt: skip
AUDIO_CODECS = frozenset(
    {
        "mp3", "mp2", "aac", "vorbis", "opus", "flac", "alac", "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le",
        "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_alaw", "pcm_mulaw",
        "adpcm_ms", "adpcm_ima_wav", "amr_nb", "amr_wb", "gsm_ms",
    }
)  # fmt: skip
_KNOWN = {
    "video": "MP4, MOV, MKV, WebM, AVI, MPEG, OGG, FLV or GIF",
    "audio": "WAV, FLAC, MP3, OGG, AAC, M4A, AIFF, or a video with sound",
}


def reader_of(data: bytes) -> str | None:
    """FFmpeg's name for the container that ``data`` begins as; None if it is none of those that are read."""
    head = data[:16]
    if head[4:8] in {b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"}:
        return "mov"
    if head[:4] == b"RIFF":
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in {b"AIFF", b"AIFC"}:
        return "aiff"
    for magic, reader in (
        (b"\x1aE\xdf\xa3", "matroska"), (b"OggS", "ogg"), (b"fLaC", "flac"), (b"FLV\x01", "flv"),
        (b"GIF87a", "gif"), (b"GIF89a", "gif"), (b"ID3", "mp3"), (b"#!AMR", "amr"),
        (b"\0\0\1\xba", "mpeg"), (b"\0\0\1\xb3", "mpegvideo"),
    ):  # fmt: skip
        if head.startswith(magic):
            return reader
    if head[:1] == b"G" and data[188:189] == b"G" and data[376:377] in {b"G", b""}:
        return "mpegts"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "aac" if head[1] & 0xF6 == 0xF0 else "mp3"  # layer 0 is ADTS
    return None


@contextmanager
def opened(data: bytes, kind: Literal["video", "audio"]) -> Iterator[tuple[InputContainer, Any]]:
    """The container and its first stream of ``kind``, of a codec that is read.

    Raises `InvalidRequest` (``invalid_media``), also for what FFmpeg raises inside of the block."""
    try:
        import av
    except ImportError as error:
        raise ConfigurationError(
            f"A worker needs PyAV to read {kind}s, which can't be imported ({error}).",
            code="missing_extra",
            hint="Install it: pip install 'tokenfleet[hf]'",
        ) from error
    reader = reader_of(data)
    if reader is None:
        raise invalid(f"The {kind} is of no format that is read.", f"Send {_KNOWN[kind]}.")
    try:
        with av.open(io.BytesIO(data), mode="r", format=reader, metadata_errors="ignore") as container:
            streams = [each for each in container.streams if each.type == kind]
            if not streams:
                raise invalid(f"The {kind} file holds no {kind}.", f"Send {_KNOWN[kind]}.")
            stream = streams[0]
            context: Any = stream.codec_context
            codec = context.codec.canonical_name if context is not None else "unknown"
            if codec not in (VIDEO_CODECS if kind == "video" else AUDIO_CODECS):
                raise invalid(f"The {kind} is coded as {codec}, which is not read.", "Code it as H.264, VP9 or AV1, "
                              "or as PCM, FLAC, MP3, AAC or Opus.")  # fmt: skip
            context.thread_count = 1
            yield container, stream
    except (av.error.FFmpegError, EOFError, OSError, ValueError) as error:  # ValueError: PyAV's own, of a frame
        raise invalid(f"The {kind} can't be decoded: {_reason(error)}.", "Is the file whole?") from error


def seconds_of(container: InputContainer, stream: Any) -> float | None:
    """What the header says; None where it doesn't."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration is not None else None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or type(error).__name__)
