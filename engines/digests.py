"""Digests of the files that make a model, for fingerprints: the same on every machine that has the same files."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECES = 64
_PIECE_BYTES = 1 << 16
_SUFFIXES = {".safetensors", ".json", ".bin", ".model", ".jinja", ".txt"}


def folder_digest(folder: Path) -> dict[str, str]:
    """File name → sha256 of each file in ``folder`` that a model is made of."""
    return {file.name: _file_digest(file) for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES}


def _file_digest(file: Path) -> str:
    """Of the whole of a small file; of a large one its size and 64 pieces spread over it, the header among them
    (reading all of it can take longer than loading it)."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        if size <= _PIECES * _PIECE_BYTES:
            digest.update(data.read())
        else:
            for piece in range(_PIECES):
                data.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
                digest.update(data.read(_PIECE_BYTES))
    return digest.hexdigest()
