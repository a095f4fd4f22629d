"""What every engine is loaded with that has a model's files: names are LLaMA-Factory's where it has one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.wire.errors import ConfigurationError


def _comma_list(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return () if value is None else value


def json_mapping(value: object) -> object:
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is neither a mapping nor JSON: {error}") from error


CommaList = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
"""A list, or text with commas."""
JsonMapping = Annotated[dict[str, Any], BeforeValidator(json_mapping)]
"""A mapping, or JSON text of one."""


class ModelOptions(MediaSettings):
    """An engine's options inherit it. Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name_or_path: str = Field(min_length=1)
    """A folder, a GGUF file, a hub id, or the built-in small model's name (`engines.models.resolve`)."""
    model_revision: str | None = None
    label: str | None = None
    """The model's name for people and fingerprints; by default the last part of its path."""
    adapter_name_or_path: CommaList = ()
    """Adapters that every request gets. Also where a value head is looked for."""
    adapter_folder: str | None = None
    """Subfolder of each adapter's path or hub repository that holds its files."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name → path or hub id of LoRA adapters that a request may choose by name."""
    cache_dir: Path | None = None
    rewards: bool = False
    """A reward model: a sequence classifier, or a model with a value head beside it or an adapter. Loading any other
    is refused."""

    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a CPU (few have fast 16-bit arithmetic), else the dtype of the checkpoint."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Load weights that are not safetensors. A pickle can run code."""

    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """Twice the model's context by stretching its rotary positions."""

    def dtype_on(self, *, is_cpu: bool) -> str:
        return "float32" if is_cpu and self.infer_dtype == "auto" else self.infer_dtype

    @property
    def shown_name(self) -> str:
        """For people and messages; never a path."""
        return self.label or self.model_name_or_path.rstrip("/").rsplit("/", 1)[-1]


class CoreOptions(ModelOptions):
    """Of an engine that is a server by nature, with a core in processes of its own: vLLM, SGLang."""

    quantization_bit: Literal[4, 8] | None = None
    quantization_method: Literal["bnb", "fp8"] | None = None
    """How ``quantization_bit`` is done at load, on a GPU: None takes bnb for 4 bits (vLLM before 0.32) and fp8 for 8.
    A checkpoint that is already quantised brings its own method."""
    rope_scaling: Literal["linear", "yarn", "llama3"] | None = None
    """Not ``dynamic``: both engines stretch short texts too (sglang/srt/layers/rotary_embedding/rope_variant.py)."""
    max_batch_size: int = Field(256, ge=1, le=4096)
    """Slots: sequences decoded together (vLLM's max_num_seqs, SGLang's max_running_requests)."""

    @model_validator(mode="after")
    def _method_fits_bits(self) -> Self:
        if self.quantization_bit is None and self.quantization_method is not None:
            raise ValueError("quantization_method says how quantization_bit is done, and there is none")
        if (self.quantization_bit, self.quantization_method) in {(8, "bnb"), (4, "fp8")}:
            raise ValueError("vLLM and SGLang quantise at load to 4 bits with bnb or to 8 with fp8")
        return self

    @property
    def load_quantization(self) -> str | None:
        """The engines' name of what ``quantization_bit`` asks for."""
        return {None: None, 4: "bitsandbytes", 8: "fp8"}[self.quantization_bit]


MOST_ADAPTERS_AT_ONCE = 8
"""In one batch of vLLM's or SGLang's on a GPU, where each has memory of its own."""


def quantised_by(method: str | None) -> dict[str, Any]:
    """vLLM's and SGLang's arguments for it."""
    # bitsandbytes has a loader of its own, which takes safetensors only.
    return {"quantization": method} | ({"load_format": "bitsandbytes"} if method == "bitsandbytes" else {})


def lift(values: Any, config: str, names: Mapping[str, str]) -> Any:
    """``values`` with what its mapping ``config`` says of an option put under the option's own name. ``names``: the
    engine's name → ours. For a validator ``mode="before"``: raises `ValueError` where both are said, and differ."""
    if not isinstance(values, Mapping):
        return values
    try:
        further = json_mapping(values.get(config))
    except ValueError:
        return values  # the field's own validator says what is wrong
    if not isinstance(further, Mapping):
        return values
    lifted = {**values, config: {name: value for name, value in further.items() if name not in names}}
    for name in names.keys() & further.keys():
        own = names[name]
        if lifted.setdefault(own, further[name]) != further[name]:
            raise ValueError(f"{config} says {name}={further[name]!r}, and {own} says {lifted[own]!r}")
    return lifted


def refuse_own(name: str, given: Mapping[str, Any], own: Collection[str]) -> None:
    """Raises `ValueError` if ``given``, an engine's further arguments, name one that tokenfleet sets itself."""
    if taken := sorted(set(own) & given.keys()):
        raise ValueError(f"{name} may not set {taken[0]!r}, which tokenfleet sets itself")


def with_needed(name: str, given: Mapping[str, Any], needed: Mapping[str, Any]) -> Mapping[str, Any]:
    """``needed``, what a model that reads in both directions wants of its engine's own options; raises
    `ConfigurationError` for one of the config ``name`` that says otherwise."""
    for option, value in needed.items():
        if given.get(option, value) != value:
            raise ConfigurationError(
                f"{name}: {option} is to be {value} for this model, which attends to tokens that come later.",
                hint="Leave it out.",
            )
    return needed
