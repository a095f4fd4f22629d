"""LLaMA-Factory's inference arguments (0.9.5 names), and what they mean for a fleet.

Every name that is understood stands here; any other is refused by name. A name that the chosen engine has no use for is
refused too: nothing is silently ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenfleet.producer.llama_factory import without_unused
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.local_files import LocalFleetConfig
from tokenfleet.wire.support import check_supported

Backend = Literal["hf", "huggingface", "transformers", "vllm", "sglang", "scripted"]
DEFAULT_MODEL = "smollm2-135m-instruct"

_ENGINES = {"hf": "transformers", "huggingface": "transformers"}
ALIASES = {"max_tokens": "max_new_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}
"""Other names of generation parameters."""
_GENERATION = frozenset(GenerationParams.model_fields) | ALIASES.keys()

WORKER_NAMES = (
    "template", "default_system", "enable_thinking", "preserve_thinking", "neutral_special_tokens", "slots",
)  # fmt: skip
"""Arguments that are settings of a worker, whatever its engine."""


class FleetArguments(BaseModel):
    """All arguments but the generation parameters. Either ``redis_url`` (a running fleet) or a model to load."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # A running fleet
    redis_url: str | None = None
    fleet: str = "default"
    model: str | None = Field(None, max_length=128)
    """Public name of the served model; by default the last part of model_name_or_path."""

    # The model
    model_name_or_path: str | None = None
    adapter_name_or_path: str | tuple[str, ...] | None = None
    adapters: dict[str, str] | None = None
    adapter_folder: str | None = None
    cache_dir: str | None = None
    model_revision: str | None = None
    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    neutral_special_tokens: bool | None = None
    infer_backend: Backend = "hf"
    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    quantization_bit: int | None = None
    quantization_method: str | None = None
    rope_scaling: str | None = None
    flash_attn: str | None = None
    trust_remote_code: bool | None = None
    finetuning_type: Literal["lora", "oft", "freeze", "full"] | None = None
    """Accepted for LLaMA-Factory's files; what an adapter is stands in its own files."""
    stage: Literal["sft", "rm"] | None = None
    """LLaMA-Factory's: ``rm`` is a reward model, for `get_scores`. The same as ``rewards``."""
    rewards: bool | None = None
    """Load a reward model: a sequence classifier, or one with a value head beside it or its last adapter."""

    # vLLM and SGLang
    vllm_maxlen: int | None = None
    vllm_gpu_util: float | None = None
    vllm_enforce_eager: bool | None = None
    vllm_max_lora_rank: int | None = None
    vllm_config: dict[str, Any] | str | None = None
    sglang_maxlen: int | None = None
    sglang_mem_fraction: float | None = None
    sglang_tp_size: int | None = None
    sglang_config: dict[str, Any] | str | None = None

    # How images, videos and audios are prepared
    image_max_pixels: int | None = None
    image_min_pixels: int | None = None
    image_do_pan_and_scan: bool | None = None
    crop_to_patches: bool | None = None
    video_max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_fps: float | None = None
    video_maxlen: int | None = None
    use_audio_in_video: bool | None = None
    audio_sampling_rate: int | None = None

    # The local fleet
    workers: int = Field(1, ge=1, le=64)
    gpus: str | None = None
    slots: int | None = Field(None, ge=1)
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further options of the engine, under its own names."""

    @property
    def engine(self) -> str:
        return _ENGINES.get(self.infer_backend, self.infer_backend)

    @property
    def served_as(self) -> str:
        """The served model's public name."""
        if self.model:
            return self.model
        path = self.model_name_or_path or ("scripted" if self.engine == "scripted" else DEFAULT_MODEL)
        return path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")

    def check_remote(self, *taken: str) -> None:
        """With ``redis_url``: a running fleet is run by others, and nothing said here could change its workers. Raises
        `ConfigurationError` for what would try to; ``taken`` are names of which the caller makes something else."""
        said = self.model_fields_set - _OF_A_CLIENT - set(taken)
        if useless := sorted(name for name in said if getattr(self, name) is not None):
            raise ConfigurationError(
                f"{', '.join(useless)}: the workers of a running fleet decide that, not its clients.",
                hint="Leave it out (model names a served model), or for a local fleet the URL (TOKENFLEET_REDIS_URL).",
            )

    def local_fleet(self, **overrides: Any) -> LocalFleetConfig:
        """How to run a local fleet that serves this. Raises `ConfigurationError`."""
        worker: dict[str, Any] = {"model": self.served_as, "engine": self.engine, "engine_args": self._engine_args()}
        for name in WORKER_NAMES:
            if (value := getattr(self, name)) is not None:
                worker[name] = value
        gpus = None if self.gpus is None else tuple(part for part in self.gpus.split(",") if part)
        return LocalFleetConfig(worker=worker, workers=self.workers, gpus=gpus, **overrides)

    def _engine_args(self) -> dict[str, Any]:
        engine = self.engine
        args = dict(self.engine_args)
        for name in _MODEL_NAMES + _VLLM_NAMES + _SGLANG_NAMES:
            value = getattr(self, name)
            if value is None:
                continue
            wrong = (name in _VLLM_NAMES and engine != "vllm") or (name in _SGLANG_NAMES and engine != "sglang")
            if wrong or (engine == "scripted" and name != "model_name_or_path"):
                raise ConfigurationError(f"{name} means nothing to the engine {engine!r}.", hint="Leave it out.")
            if name == "flash_attn" and engine in _CHOOSE_ATTENTION:
                if value != "auto":
                    hint = f"Leave it out; {engine}_config: {{attention_backend: ...}} takes the engine's own names."
                    raise ConfigurationError(f"flash_attn={value}: {engine} chooses its attention itself.", hint=hint)
                continue
            if engine != "scripted":
                args[name] = value
        if self.stage == "rm":
            if self.rewards is False:
                raise ConfigurationError("stage=rm is a reward model, and rewards says that it is none.")
            if engine != "scripted":
                args["rewards"] = True
        if engine != "scripted":
            args.setdefault("model_name_or_path", DEFAULT_MODEL)
        return args


_OF_A_CLIENT = frozenset({"redis_url", "fleet", "model", "enable_thinking"})
_BRANCHES = ("str", "dict[", "tuple[")
"""pydantic's names of a union's branches, which are nothing that a user has written."""
_CHOOSE_ATTENTION = ("vllm", "sglang")
_VLLM_NAMES = tuple(name for name in FleetArguments.model_fields if name.startswith("vllm_"))
_SGLANG_NAMES = tuple(name for name in FleetArguments.model_fields if name.startswith("sglang_"))
_MODEL_NAMES = (
    "model_name_or_path", "adapter_name_or_path", "adapters", "adapter_folder", "cache_dir", "model_revision",
    "infer_dtype", "quantization_bit", "quantization_method", "rope_scaling", "flash_attn", "trust_remote_code",
    "rewards",
    "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
    "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate",
)  # fmt: skip


def split_arguments(args: Mapping[str, Any]) -> tuple[FleetArguments, dict[str, Any]]:
    """Fleet arguments and default generation parameters out of one flat mapping, as LLaMA-Factory's files have them.

    Raises `ConfigurationError` that names what is unknown or wrong, `InvalidRequest` for a parameter that the engine to
    be loaded would refuse in every chat."""
    generation = {name: value for name, value in args.items() if name in _GENERATION}
    rest = without_unused({name: value for name, value in args.items() if name not in _GENERATION})
    known = set(FleetArguments.model_fields)
    if unknown := sorted(set(rest) - known):
        near = difflib.get_close_matches(unknown[0], known | _GENERATION, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "`tokenfleet chat --help` lists all."
        raise ConfigurationError(f"Unknown argument{'s' * (len(unknown) > 1)}: {', '.join(unknown)}.", hint=hint)
    try:
        params, fleet = GenerationParams.model_validate(generation), FleetArguments.model_validate(rest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(_BRANCHES))
        raise ConfigurationError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error
    if fleet.redis_url is None:
        check_supported(fleet.engine, params)
    return fleet, generation
