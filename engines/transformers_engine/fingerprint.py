"""One value for all that decides which tokens a loaded model gives: the same on every machine that loads the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from tokenfleet.engines.digests import folder_digest
from tokenfleet.engines.media import MediaSettings
from tokenfleet.engines.transformers_engine.options import TransformersOptions


def fingerprint(weights: Sequence[Path], adapters: Mapping[str, Path], dtype: str, options: TransformersOptions) -> str:
    """32 hex digits. ``weights``: the model's folder and the adapters merged into it, in their order."""
    facts = {
        "weights": [folder_digest(folder) for folder in weights],
        "adapters": {name: folder_digest(folder) for name, folder in adapters.items()},
        "dtype": dtype,
        "quantization": [options.quantization_bit, options.quantization_method],
        "rope_scaling": options.rope_scaling,
        "media": {name: getattr(options, name) for name in MediaSettings.model_fields if not name.startswith("media_")},
        "transformers": transformers.__version__,
        # The build (+cpu, +cu130) says little about the numbers: a CPU worker may continue a GPU worker's job.
        "torch": torch.__version__.split("+")[0],
        "tokenfleet": importlib.metadata.version("tokenfleet"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
