"""Small media of real formats, made without a library: each number is another one."""

from __future__ import annotations

import struct
import zlib


def png(number: int = 0, side: int = 4) -> bytes:
    """A grey picture of ``side`` × ``side`` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes((number + 7 * x + y) % 256 for x in range(side)) for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def padded(data: bytes, size: int) -> bytes:
    """The same file with bytes after its end, ``size`` in all."""
    return data + b"\0" * (size - len(data))


def wav(number: int = 0, samples: int = 160) -> bytes:
    """16-bit samples of one channel at 16 kHz."""
    body = struct.pack(f"<{samples}h", *((number * 37 + k * 101) % 2000 - 1000 for k in range(samples)))
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(body))
    return b"RIFF" + struct.pack("<I", len(head) + len(body)) + head + body


def mp4(number: int = 0) -> bytes:
    """Begins as an MP4 does; nothing decodes it."""
    return b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes([number % 256])
