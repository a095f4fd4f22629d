"""What an engine that runs in processes of its own reads of a model's folder by itself, before these read the rest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenfleet.engines import models
from tokenfleet.engines.base import EngineInfo
from tokenfleet.engines.digests import folder_digest
from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.engines.options import ModelOptions
from tokenfleet.engines.tensors import names_in
from tokenfleet.wire.errors import ConfigurationError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
QUANTISED = "quantization_config"
"""The entry of a config.json that says how its weights are packed."""


@dataclass(frozen=True, slots=True)
class Folders:
    """What the options name, here on this machine. ``fixed``: adapters of all requests, ``chosen``: those by name."""

    model: Path
    fixed: tuple[Path, ...]
    chosen: Mapping[str, Path]

    @classmethod
    def of(cls, options: ModelOptions) -> Folders:
        """Fetches what is not here. Raises `UnknownModel`, `ConfigurationError`."""

        def resolved(name: str, revision: str | None = None) -> Path:
            return models.resolve(name, revision=revision, allow_pickle=options.allow_pickle, cache=options.cache_dir)

        subfolder = options.adapter_folder or ""
        return cls(
            resolved(options.model_name_or_path, options.model_revision),
            tuple(resolved(name) / subfolder for name in options.adapter_name_or_path),
            {name: resolved(path) / subfolder for name, path in options.adapters.items()},
        )

    def info(
        self,
        options: ModelOptions,
        name: str,
        version: str,
        *,
        context_tokens: int,
        slots: int,
        vocab_size: int,
        can_score: bool,
        can_generate: bool,
        media: Collection[str],
        **facts: Any,
    ) -> EngineInfo:
        """Of the engine ``name``. ``media``: kinds that the model takes beside text. ``facts``: what else decides which
        tokens it gives in this engine; JSON."""
        return EngineInfo(
            name=name,
            version=version,
            model=options.shown_name,
            fingerprint=self._fingerprint(options, {name: version, "rope_scaling": options.rope_scaling, **facts}),
            context_tokens=context_tokens,
            slots=slots,
            vocab_size=vocab_size,
            adapters=tuple(self.chosen),
            can_score=can_score,
            can_generate=can_generate,
            modalities=("text", *media),
            eos_ids=eos_ids(self.model),
        )

    def _fingerprint(self, options: ModelOptions, facts: Mapping[str, Any]) -> str:
        """32 hex digits that change with anything that decides which tokens the model gives (`EngineInfo`)."""
        media = {name: getattr(options, name) for name in MediaSettings.model_fields if not name.startswith("media_")}
        known = {
            "weights": [folder_digest(each) for each in (self.model, *self.fixed)],
            "adapters": {name: folder_digest(path) for name, path in self.chosen.items()},
            "media": media,
            "tokenfleet": importlib.metadata.version("tokenfleet"),
            **facts,
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def read_json(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises `ConfigurationError` if it can't be read."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigurationError(f"{file.name} of the model is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file.name} of the model is no JSON object.")
    return found


def eos_ids(model: Path) -> frozenset[int]:
    """What ends a text by the model's own generation config; without one, by its config, as transformers has it."""
    name = "generation_config.json"
    if (model / name).is_file():
        eos = read_json(model / name).get("eos_token_id")
    else:
        config = read_json(model / "config.json")
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    given = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in given):
        raise ConfigurationError("The model's eos_token_id is no token id, and no list of them.")
    # -1 stands for "none" in some; no token has it.
    return frozenset(token for token in given if token >= 0)


def architectures(model: Path) -> tuple[str, ...]:
    return tuple(read_json(model / "config.json").get("architectures") or ())


def is_classifier(model: Path) -> bool:
    """Whether it gives scores by itself, and no text."""
    return any(name.endswith("ForSequenceClassification") for name in architectures(model))


def check_scores(model: Path, label: str) -> None:
    """Raises `ConfigurationError` for a classifier with several labels: which of them were the score?"""
    config = read_json(model / "config.json")
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))  # transformers' own default are two
    if is_classifier(model) and labels != 1:
        raise ConfigurationError(
            f"{label!r} is a classifier with {labels} labels, which gives no score.", hint="A reward model has one."
        )


def check_weights(model: Path, label: str, *, allow_pickle: bool) -> None:
    """Raises `ConfigurationError` for a model that only pickles hold, or of which a file is cut or missing, before an
    engine takes half a minute to start."""
    eos_ids(model)
    files = [file for file in sorted(model.glob("*.safetensors")) if not file.name.startswith("value_head.")]
    if not allow_pickle and not files:
        raise ConfigurationError(
            f"The model {label!r} has no safetensors weights.",
            hint="Pickled weights can run code when loaded; set allow_pickle only for a model you trust.",
        )
    if not (model / "model.safetensors").is_file():
        named = set(read_json(model / "model.safetensors.index.json").get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (model / name).is_file()):
            raise ConfigurationError(
                f"The model {label!r} lacks {len(missing)} of its {len(named)} files: {', '.join(missing[:3])}.",
                hint="Was it fetched or copied whole?",
            )
    names = [name for file in files for name in names_in(file)]
    # SGLang would compute with whatever lies in the place of weights that it did not find.
    found = {match[1] for name in names if (match := _LAYER.match(name))}
    layers = read_json(model / "config.json").get("num_hidden_layers")
    if found and isinstance(layers, int) and (missing := [i for i in range(layers) if str(i) not in found]):
        raise ConfigurationError(
            f"The model {label!r} lacks the weights of {len(missing)} of its {layers} layers, {missing[0]} first.",
            hint="Are all of its files there, and of one version?",
        )


def has_processor(model: Path) -> bool:
    """Whether its makers gave it something that prepares media."""
    return any((model / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def first_line(error: BaseException) -> str:
    """What a foreign error says, in a line; of pydantic's the reason, without what was given."""
    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("Value error, ") if lines else type(error).__name__
