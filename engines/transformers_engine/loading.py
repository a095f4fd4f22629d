"""Loads a model as the batches use it: weights, tokenizer, dtype, device, and how to call its forward."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenfleet.engines import models
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.options import TransformersOptions
from tokenfleet.wire.errors import ConfigurationError, EngineError

_HASHED_PIECES = 64
_PIECE_BYTES = 1 << 16


class LoadedModel:
    def __init__(self, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        text_config = model.config.get_text_config()
        self.layers: int = text_config.num_hidden_layers
        self.vocab_size: int = text_config.vocab_size
        self.context_tokens: int = _context_tokens(text_config)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.dtype
        self.can_score = False
        eos = getattr(model.generation_config, "eos_token_id", None)
        self.eos_ids = frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,))
        accepted = inspect.signature(model.forward).parameters
        self._wants_positions = "position_ids" in accepted
        self._wants_last = "logits_to_keep" in accepted

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Sequence[str | None],
    ) -> torch.Tensor:
        """Logits of the last column, ``[rows, vocab]``; the new columns are in ``cache`` but not yet counted."""
        more: dict[str, Any] = {}
        if self._wants_positions:
            more["position_ids"] = positions.to(self.device)
        if self._wants_last:
            more["logits_to_keep"] = 1
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **more,
        )
        return out.logits[:, -1]

    def batch_key(self, adapter: str | None) -> object:
        """Sequences with equal keys can share a forward pass."""
        return adapter

    def score(self, texts_ids: list[tuple[int, ...]], adapter: str | None) -> list[float]:
        raise EngineError("This model has no reward head.", code="unsupported")

    @property
    def cache_bytes_per_token(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self.layers * heads * head_dim * self.dtype.itemsize)


def load(options: TransformersOptions) -> LoadedModel:
    """Raises `ConfigurationError` for what can't be loaded, saying why."""
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = models.resolve(
        options.model_name_or_path,
        revision=options.model_revision,
        allow_pickle=options.allow_pickle,
        cache=options.cache_dir,
    )
    device = _device(options)
    dtype = _dtype(options, device)
    kwargs: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kwargs)
        config = transformers.AutoConfig.from_pretrained(folder, **kwargs)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map="auto" if device.type == "cuda" else None,
            use_safetensors=None if options.allow_pickle else True,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"The model {_label(options)!r} can't be loaded: {error}") from error
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, _fingerprint(folder, model.dtype, options))


def _label(options: TransformersOptions) -> str:
    return options.label or Path(options.model_name_or_path).name


def _device(options: TransformersOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda, but torch sees no GPU.", hint="Leave device at auto, or set cpu.")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def _dtype(options: TransformersOptions, device: torch.device) -> Any:
    if options.infer_dtype != "auto":
        return getattr(torch, options.infer_dtype)
    return torch.float32 if device.type == "cpu" else "auto"


def _context_tokens(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def _fingerprint(folder: Path, dtype: torch.dtype, options: TransformersOptions) -> str:
    """The same wherever the same files are loaded in the same way by the same versions."""
    facts = {
        "files": {file.name: _file_digest(file) for file in sorted(folder.iterdir()) if _matters(file)},
        "dtype": str(dtype),
        "quantization": [options.quantization_bit, options.quantization_method],
        "rope_scaling": options.rope_scaling,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tokenfleet": importlib.metadata.version("tokenfleet"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _matters(file: Path) -> bool:
    return file.suffix in {".safetensors", ".json", ".bin", ".model", ".jinja", ".txt"} and file.name != "README.md"


def _file_digest(file: Path) -> str:
    """Of the whole of a small file; of a large one its size, both ends and 62 pieces between (reading it all can take
    longer than loading it)."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        if size <= _HASHED_PIECES * _PIECE_BYTES:
            digest.update(data.read())
        else:
            for piece in range(_HASHED_PIECES):
                data.seek(piece * (size - _PIECE_BYTES) // (_HASHED_PIECES - 1))
                digest.update(data.read(_PIECE_BYTES))
    return digest.hexdigest()
