"""Starts vLLM: where the model and its adapters are, the arguments, the engine core's process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenfleet.engines.base import EngineInfo
from tokenfleet.engines.folders import (
    QUANTISED,
    Folders,
    architectures,
    check_scores,
    check_weights,
    first_line,
    is_classifier,
    read_json,
)
from tokenfleet.engines.lora_joining import Choices, choices
from tokenfleet.engines.options import MOST_ADAPTERS_AT_ONCE, quantised_by, with_needed
from tokenfleet.engines.rewards import RewardHead, find_value_head, no_rewards
from tokenfleet.engines.rope import overridden
from tokenfleet.engines.vllm_engine import adapters as lora
from tokenfleet.engines.vllm_engine import compat, cpu_blocks
from tokenfleet.engines.vllm_engine.media import VllmMedia, check_folder
from tokenfleet.engines.vllm_engine.options import VllmOptions
from tokenfleet.wire.errors import ConfigurationError, EngineDead


@dataclass(frozen=True, slots=True)
class LoadedVllm:
    """``lora`` maps a request's adapter (None: no choice) to vLLM's `LoRARequest`."""

    engine: Any
    """`vllm.v1.engine.async_llm.AsyncLLM`"""
    tokenizer: Any
    """`transformers.PreTrainedTokenizerBase`"""
    info: EngineInfo
    lora: Mapping[str | None, Any]
    media: VllmMedia | None
    """None: a model of texts."""
    head: RewardHead | None
    """What makes a score of a last hidden state. None: the model makes it, if it is a classifier."""
    folders: contextlib.ExitStack
    """Closing it removes what was written for vLLM to read."""
    tokenizer_facts: Mapping[str, Any]
    """What the engine core is to load the tokenizer with, should it need one (`extras.Guides`)."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the options name; ``model`` is the folder for vLLM to read."""

    folders: Folders
    model: Path
    lora: Choices
    is_classifier: bool
    head: RewardHead | None

    @property
    def is_pooling(self) -> bool:
        return self.is_classifier or self.head is not None


def load(options: VllmOptions) -> LoadedVllm:
    """Blocks for a minute. Raises `ConfigurationError` for what can't be loaded, `UnknownModel`, `EngineDead`."""
    import vllm

    with contextlib.ExitStack() as folders:
        parts = _parts(options, folders)
        if not parts.is_pooling:
            check_folder(parts.model, options.shown_name, options, trust_remote_code=options.trust_remote_code)
        engine, tokenizer = _started(parts, options)
        takes_media = engine.model_config.is_multimodal_model and not parts.is_pooling
        media = VllmMedia(engine, options) if takes_media else None
        config = engine.model_config
        info = parts.folders.info(
            options,
            "vllm",
            vllm.__version__,
            context_tokens=config.max_model_len,
            slots=options.max_batch_size,
            vocab_size=config.get_vocab_size(),
            can_score=parts.is_pooling,
            can_generate=not parts.is_pooling,
            media=media.modalities if media else (),
            dtype=str(config.dtype),
            quantization=options.quantization_bit,
            # All of it: which of vLLM's arguments change the numbers is for vLLM to know.
            vllm_config={name: repr(value) for name, value in sorted(options.vllm_config.items())},
        )
        from vllm.lora.request import LoRARequest

        requests = {
            name: LoRARequest(name or "fixed", place, str(adapter.path))
            for place, (name, adapter) in enumerate(parts.lora.items(), start=1)
        }
        facts = {
            "tokenizer": str(parts.model),
            "trust_remote_code": options.trust_remote_code,
            "vocab_size": info.vocab_size,
        }
        return LoadedVllm(engine, tokenizer, info, requests, media, parts.head, folders.pop_all(), facts)


def _parts(options: VllmOptions, folders: contextlib.ExitStack) -> _Parts:
    found = Folders.of(options)
    model, fixed = found.model, found.fixed
    check_weights(model, options.shown_name, allow_pickle=options.allow_pickle)
    check_scores(model, options.shown_name)
    head = find_value_head([*reversed(fixed), model]) if options.rewards else None
    if options.rewards and not is_classifier(model) and head is None:
        raise no_rewards(options.shown_name)
    heads = lora.HEADS if is_classifier(model) else ()
    adapters = choices(found, folders, allow_pickle=options.allow_pickle, saved=heads)
    if any(model.glob("value_head.*")):
        model = _without_head(
            model, Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-vllm-")))
        )
    return _Parts(found, model, adapters, is_classifier(model), head)


def _without_head(model: Path, folder: Path) -> Path:
    """A folder of links to all the model's files but its value head: vLLM would look for a place for that, too."""
    for file in model.iterdir():
        if not file.name.startswith("value_head."):
            (folder / file.name).symlink_to(file.resolve())
    return folder


def _started(parts: _Parts, options: VllmOptions) -> tuple[Any, Any]:
    """`AsyncLLM` and the tokenizer."""
    import transformers
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    label = options.shown_name
    is_v2 = not parts.is_pooling and compat.may_use_v2()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(parts.model, trust_remote_code=options.trust_remote_code)
        config = AsyncEngineArgs(**_arguments(parts, options, is_v2=is_v2)).create_engine_config()
        if is_v2 and not compat.uses_v2(config):
            config = AsyncEngineArgs(**_arguments(parts, options, is_v2=False)).create_engine_config()
    except TypeError as error:
        raise ConfigurationError(f"vllm_config has what vLLM {vllm.__version__} does not know: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"The model {label!r} can't be loaded by vLLM: {first_line(error)}") from error
    if parts.head is not None:
        parts.head.check_width(config.model_config.get_hidden_size())
    try:
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True), tokenizer
    except (RuntimeError, EngineDeadError) as error:  # the core's own reason is in its output, above
        raise EngineDead(
            f"vLLM's engine core did not start for {label!r}: {first_line(error)}",
            hint="Its reason stands above; often too little memory: lower vllm_maxlen or vllm_gpu_util.",
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"The model {label!r} can't be loaded by vLLM: {first_line(error)}") from error


def _arguments(parts: _Parts, options: VllmOptions, *, is_v2: bool) -> dict[str, Any]:
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    needed = cpu_blocks.arguments(architectures(parts.model)) if is_cpu else {}
    args: dict[str, Any] = {
        "structured_outputs_config": {"backend": "guidance"},  # one dialect of grammars with the transformers engine
        "disable_log_stats": True,
        "enable_log_requests": False,  # they hold prompts
        **options.vllm_config,
        "model": str(parts.model),
        "trust_remote_code": options.trust_remote_code,
        # Kernels of quantised checkpoints take 16 bits only, on a CPU too.
        "dtype": options.dtype_on(is_cpu=is_cpu and not read_json(parts.model / "config.json").get(QUANTISED)),
        "enforce_eager": options.vllm_enforce_eager,
        "max_num_seqs": options.max_batch_size,
        "generation_config": "vllm",  # a checkpoint's defaults must not change what a request means
        "load_format": "auto" if options.allow_pickle else "safetensors",
        **_purpose(parts, is_v2=is_v2),
        **_quantization(options),
        **_rope(parts.model, options),
        **with_needed("vllm_config", options.vllm_config, needed),
    }
    if options.vllm_maxlen is not None:
        args["max_model_len"] = options.vllm_maxlen
    if options.vllm_gpu_util is not None:
        args["gpu_memory_utilization"] = options.vllm_gpu_util
    if not is_cpu and "tensor_parallel_size" not in args and (gpus := current_platform.device_count()) > 1:
        args["tensor_parallel_size"] = gpus
    if parts.lora:
        if not is_cpu and options.infer_dtype == "float32":  # vllm/lora/ops/triton_ops/lora_shrink_op.py asserts it
            raise ConfigurationError("vLLM's adapters on a GPU need infer_dtype float16 or bfloat16.")
        adapters = list(parts.lora.values())
        args["enable_lora"], args["max_lora_rank"] = True, lora.greatest_rank(adapters, options.vllm_max_lora_rank)
        # vLLM's CPU kernels take a row without an adapter (-1) for one of the last slot: that one must stay empty
        # (vllm/lora/ops/torch_ops/lora_ops.py, 0.32).
        slots = len(adapters) + 1 if is_cpu else min(len(adapters), MOST_ADAPTERS_AT_ONCE)
        args.setdefault("max_loras", slots)
    return args


def _purpose(parts: _Parts, *, is_v2: bool) -> dict[str, Any]:
    """A model gives either text or scores. Something of ours must be imported in the core (`lifeline`)."""
    extension = "tokenfleet.engines.vllm_engine.worker.WorkerExtension"
    if parts.is_pooling:
        convert = "classify" if parts.is_classifier else "embed"
        return {"runner": "pooling", "convert": convert, "worker_extension_cls": extension}
    if is_v2:
        return {"runner": "generate", "worker_extension_cls": extension}
    from tokenfleet.engines.vllm_engine.processors import CutProcessor, HistoryProcessor

    return {"runner": "generate", "logits_processors": [HistoryProcessor, CutProcessor]}


def _quantization(options: VllmOptions) -> dict[str, Any]:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform

    method = options.load_quantization
    if method is not None and (method not in QUANTIZATION_METHODS or current_platform.is_cpu()):
        where = "on a CPU" if current_platform.is_cpu() else "in this release"
        raise ConfigurationError(
            f"quantization_bit={options.quantization_bit}: vLLM has no {method} {where}.",
            hint="Use a checkpoint that is quantised already (AWQ, GPTQ, FP8), or transformers.",
        )
    return quantised_by(method)


def _rope(folder: Path, options: VllmOptions) -> dict[str, Any]:
    if options.rope_scaling is None:
        return {}
    given = options.vllm_config.get("hf_overrides") or {}
    if not isinstance(given, Mapping):
        raise ConfigurationError("rope_scaling: vllm_config's hf_overrides must be a mapping then.")
    changed, context = overridden(folder, options.rope_scaling, trust_remote_code=options.trust_remote_code)
    return {"hf_overrides": {**given, **changed}, "max_model_len": context}
