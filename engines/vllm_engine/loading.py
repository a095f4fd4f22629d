"""Starts vLLM: where the model and its adapters are, the arguments, the engine core's process."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenfleet.engines import models
from tokenfleet.engines.base import EngineInfo
from tokenfleet.engines.digests import folder_digest
from tokenfleet.engines.vllm_engine.options import VllmOptions
from tokenfleet.wire.errors import ConfigurationError, EngineDead

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MOST_ADAPTERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class LoadedVllm:
    """``lora`` maps a request's adapter (None: no choice) to vLLM's `LoRARequest`."""

    engine: Any
    """`vllm.v1.engine.async_llm.AsyncLLM`"""
    tokenizer: Any
    """`transformers.PreTrainedTokenizerBase`"""
    info: EngineInfo
    lora: Mapping[str | None, Any]


def load(options: VllmOptions) -> LoadedVllm:
    """Blocks for a minute. Raises `ConfigurationError` for what can't be loaded, `UnknownModel`, `EngineDead`."""
    import transformers
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    folder = _resolved(options.model_name_or_path, options, options.model_revision)
    subfolder = options.adapter_folder or ""
    adapters = {name: _resolved(path, options) / subfolder for name, path in options.adapters.items()}
    fixed = [_resolved(name, options) / subfolder for name in options.adapter_name_or_path]
    label = options.label or options.model_name_or_path.rstrip("/").rsplit("/", 1)[-1]
    try:
        args = AsyncEngineArgs(**_arguments(folder, [*adapters.values(), *fixed], options))
    except TypeError as error:
        raise ConfigurationError(f"vllm_config has what vLLM {vllm.__version__} does not know: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
        config = args.create_engine_config()
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"The model {label!r} can't be loaded by vLLM: {_first_line(error)}") from error
    try:
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except (RuntimeError, EngineDeadError) as error:  # the core's own reason is in its output, above
        raise EngineDead(
            f"vLLM's engine core did not start for {label!r}: {_first_line(error)}",
            hint="Its reason stands above; often too little memory: lower vllm_maxlen or vllm_gpu_util.",
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"The model {label!r} can't be loaded by vLLM: {_first_line(error)}") from error
    model = config.model_config
    info = EngineInfo(
        name="vllm",
        version=vllm.__version__,
        model=label,
        fingerprint=_fingerprint(folder, fixed, adapters, str(model.dtype), options, vllm.__version__),
        context_tokens=model.max_model_len,
        slots=options.max_batch_size,
        vocab_size=model.get_vocab_size(),
        adapters=tuple(adapters),
        eos_ids=_eos_ids(folder),
    )
    named: list[tuple[str | None, Path]] = [*adapters.items(), *((None, path) for path in fixed)]
    lora = {name: LoRARequest(name or "fixed", place, str(path)) for place, (name, path) in enumerate(named, start=1)}
    return LoadedVllm(engine, tokenizer, info, lora)


def _resolved(name: str, options: VllmOptions, revision: str | None = None) -> Path:
    return models.resolve(name, revision=revision, allow_pickle=options.allow_pickle, cache=options.cache_dir)


def _arguments(folder: Path, adapters: list[Path], options: VllmOptions) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from tokenfleet.engines.vllm_engine.processors import CutProcessor, HistoryProcessor

    args: dict[str, Any] = {
        "structured_outputs_config": {"backend": "guidance"},  # one dialect of grammars with the transformers engine
        "disable_log_stats": True,
        "enable_log_requests": False,  # they hold prompts
        **options.vllm_config,
        "model": str(folder),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.infer_dtype,
        "enforce_eager": options.vllm_enforce_eager,
        "max_num_seqs": options.max_batch_size,
        "generation_config": "vllm",  # a checkpoint's defaults must not change what a request means
        "logits_processors": [HistoryProcessor, CutProcessor],
        "load_format": "auto" if options.allow_pickle else "safetensors",
    }
    if options.vllm_maxlen is not None:
        args["max_model_len"] = options.vllm_maxlen
    if options.vllm_gpu_util is not None:
        args["gpu_memory_utilization"] = options.vllm_gpu_util
    if current_platform.is_cpu():
        if options.infer_dtype == "auto":
            args["dtype"] = "float32"
    elif "tensor_parallel_size" not in args and (gpus := current_platform.device_count()) > 1:
        args["tensor_parallel_size"] = gpus
    if adapters:
        ranks = [_rank(path, options.allow_pickle) for path in adapters]
        needed = options.vllm_max_lora_rank or max(ranks)
        fitting = [rank for rank in _LORA_RANKS if rank >= needed]
        if not fitting or max(ranks) > needed:
            raise ConfigurationError(
                f"An adapter has rank {max(ranks)}, and vllm_max_lora_rank is {needed}.",
                hint=f"vLLM's ranks are {', '.join(map(str, _LORA_RANKS))}.",
            )
        args["enable_lora"], args["max_lora_rank"] = True, fitting[0]
        args.setdefault("max_loras", min(len(adapters), _MOST_ADAPTERS_AT_ONCE))
    return args


def _rank(folder: Path, allow_pickle: bool) -> int:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank = max([int(config["r"]), *map(int, config.get("rank_pattern", {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{folder.name!r} is no LoRA adapter: its adapter_config.json is missing or has no rank."
        ) from error
    if not allow_pickle and not (folder / "adapter_model.safetensors").is_file():
        raise ConfigurationError(
            f"The adapter {folder.name!r} has no adapter_model.safetensors.",
            hint="Pickled weights can run code when loaded; set allow_pickle only for an adapter you trust.",
        )
    return rank


def _eos_ids(folder: Path) -> frozenset[int]:
    try:
        eos = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except FileNotFoundError:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,))


def _fingerprint(
    folder: Path, fixed: list[Path], adapters: Mapping[str, Path], dtype: str, options: VllmOptions, version: str
) -> str:
    facts = {
        "weights": [folder_digest(each) for each in (folder, *fixed)],
        "adapters": {name: folder_digest(path) for name, path in adapters.items()},
        "dtype": dtype,
        # All of it: which of vLLM's arguments change the numbers is for vLLM to know.
        "vllm_config": {name: repr(value) for name, value in sorted(options.vllm_config.items())},
        "vllm": version,
        "tokenfleet": importlib.metadata.version("tokenfleet"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if type(error).__name__ == "ValidationError" and len(lines) > 1 else lines[0]) if lines else ""
