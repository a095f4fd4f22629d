"""One value for all that decides which tokens a loaded model gives: the same on every machine that loads the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from tokenfleet.engines.transformers_engine.options import TransformersOptions

_PIECES = 64
_PIECE_BYTES = 1 << 16
_SUFFIXES = {".safetensors", ".json", ".bin", ".model", ".jinja", ".txt"}


def fingerprint(weights: Sequence[Path], adapters: Mapping[str, Path], dtype: str, options: TransformersOptions) -> str:
    """32 hex digits. ``weights``: the model's folder and the adapters merged into it, in their order."""
    facts = {
        "weights": [_folder_digest(folder) for folder in weights],
        "adapters": {name: _folder_digest(folder) for name, folder in adapters.items()},
        "dtype": dtype,
        "quantization": [options.quantization_bit, options.quantization_method],
        "rope_scaling": options.rope_scaling,
        "transformers": transformers.__version__,
        # The build (+cpu, +cu130) says little about the numbers: a CPU worker may continue a GPU worker's job.
        "torch": torch.__version__.split("+")[0],
        "tokenfleet": importlib.metadata.version("tokenfleet"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _folder_digest(folder: Path) -> dict[str, str]:
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
