"""Starts SGLang: where the model and its adapters are, the arguments, the scheduler's process."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenfleet.engines.base import EngineInfo
from tokenfleet.engines.folders import (
    Folders,
    architectures,
    check_scores,
    check_weights,
    first_line,
    is_classifier,
    read_json,
)
from tokenfleet.engines.lora_joining import choices
from tokenfleet.engines.options import MOST_ADAPTERS_AT_ONCE, quantised_by, with_needed
from tokenfleet.engines.rope import overridden
from tokenfleet.engines.sglang_engine import seeing
from tokenfleet.engines.sglang_engine.adapters import completed
from tokenfleet.engines.sglang_engine.front import FrontEnd
from tokenfleet.engines.sglang_engine.media import SglangMedia, media_processor
from tokenfleet.engines.sglang_engine.options import SglangOptions
from tokenfleet.engines.sglang_engine.pool import cpu_pool_tokens
from tokenfleet.wire.errors import ConfigurationError, EngineDead

_CPU_PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadedSglang:
    """``lora`` maps a request's adapter (None: no choice) to SGLang's name of it."""

    front: FrontEnd
    tokenizer: Any
    """`transformers.PreTrainedTokenizerBase`"""
    info: EngineInfo
    lora: Mapping[str | None, str]
    media: SglangMedia | None


def load(options: SglangOptions) -> LoadedSglang:
    """Blocks for a minute; not for the main thread, in which SGLang takes signals over. Raises `ConfigurationError` for
    what can't be loaded, `UnknownModel`, `EngineDead`."""
    import sglang
    import transformers

    folders, label = Folders.of(options), options.shown_name
    folder = folders.model
    if options.sglang_config.get("load_format") != "dummy":
        check_weights(folder, label, allow_pickle=options.allow_pickle)
    check_scores(folder, label)
    if options.rewards and not _gives_scores(folder):
        raise ConfigurationError(
            f"rewards: {label!r} is no sequence classifier.", hint="A value head is for transformers or vLLM."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
        processor = media_processor(folder, tokenizer, options)
        with contextlib.ExitStack() as files:  # read when it has started
            adapters = choices(folders, files, allow_pickle=options.allow_pickle)
            place = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-sglang-")))
            adapters = {
                name: completed(each, folder, place / str(i)) for i, (name, each) in enumerate(adapters.items())
            }
            # Names of our own: what all requests get has one in SGLang, too.
            lora = {name: str(number) for number, name in enumerate(adapters)}
            paths = {lora[name]: adapter.path for name, adapter in adapters.items()}
            seeing.register(architectures(folder))
            front = FrontEnd(**_arguments(folder, paths, options))
    except TypeError as error:
        raise ConfigurationError(f"SGLang {sglang.__version__} does not know this of sglang_config: {error}") from error
    except (RuntimeError, EOFError) as error:  # the scheduler's own reason is in its output, above
        raise EngineDead(
            f"SGLang's scheduler did not start for {label!r}: {first_line(error)}",
            hint="Its reason stands above; often too little memory: lower sglang_maxlen or sglang_mem_fraction.",
        ) from error
    except (OSError, ValueError, KeyError, ImportError, AttributeError, AssertionError) as error:
        raise ConfigurationError(f"The model {label!r} can't be loaded by SGLang: {first_line(error)}") from error
    manager = front.tokenizer_manager
    model = manager.model_config
    media = None
    if processor is not None:
        media = SglangMedia(processor, model.hf_config)
        tokenizer = processor.tokenizer
    # Of prompt and answer together: SGLang silently cuts answers that end within two tokens of a limit of its own.
    room = min(manager.context_len, front.pool_tokens) - 2
    info = folders.info(
        options,
        "sglang",
        sglang.__version__,
        context_tokens=room,
        slots=options.max_batch_size,
        vocab_size=model.vocab_size,
        can_score=_gives_scores(folder),
        can_generate=not _gives_scores(folder),
        media=media.modalities if media else (),
        dtype=str(model.dtype),
        quantization=_method(options),
        # All of it: which of SGLang's arguments change the numbers is for SGLang to know.
        sglang_config={name: repr(value) for name, value in sorted(options.sglang_config.items())},
    )
    return LoadedSglang(front, tokenizer, info, lora, media)


def _arguments(folder: Path, lora: Mapping[str, Path], options: SglangOptions) -> dict[str, Any]:
    import torch

    needed = with_needed("sglang_config", options.sglang_config, seeing.arguments(architectures(folder)))
    args: dict[str, Any] = {
        "log_level": "warning",
        "load_format": "auto" if options.allow_pickle else "safetensors",
        "sleep_on_idle": True,  # else a scheduler with nothing to do keeps a core busy
        "random_seed": 0,  # of nothing that a request sees; another one per start would be another order of ranks
    }
    if not torch.cuda.is_available():
        pool_tokens = cpu_pool_tokens(read_json(folder / "config.json"), options.max_batch_size)
        args |= {
            "device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True,
            "disable_overlap_schedule": True, "max_total_tokens": pool_tokens,
        }  # fmt: skip
        if needed:  # SGLang keeps memory free for as many tokens as it may read at once
            args["max_prefill_tokens"] = _CPU_PREFILL_TOKENS
    args |= {
        **options.sglang_config,
        **needed,
        "model_path": str(folder),
        "tokenizer_path": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype_on(is_cpu=not torch.cuda.is_available()),
        "context_length": options.sglang_maxlen,
        "tp_size": options.sglang_tp_size or max(1, torch.cuda.device_count()),
        "max_running_requests": options.max_batch_size,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "is_embedding": _gives_scores(folder),
        **_quantization(options),
        **_rope(folder, options),
    }
    if options.sglang_mem_fraction is not None:
        args["mem_fraction_static"] = options.sglang_mem_fraction
    if lora:
        args |= {"enable_lora": True, "lora_paths": {name: str(path) for name, path in lora.items()}}
        args.setdefault("max_loras_per_batch", min(len(lora) + 1, MOST_ADAPTERS_AT_ONCE))  # no adapter counts as one
        if not torch.cuda.is_available():
            args.setdefault("lora_backend", "torch_native")
    return args


def _method(options: SglangOptions) -> str | None:
    """SGLang's name of it."""
    return options.quantization or options.load_quantization


def _quantization(options: SglangOptions) -> dict[str, Any]:
    import torch

    method = _method(options)
    if options.quantization_bit is not None and not torch.cuda.is_available():
        # fp8 is kernels of its own.
        raise ConfigurationError(
            f"quantization_bit={options.quantization_bit}: SGLang has no {method} on a CPU.",
            hint="Use a checkpoint that is quantised already, or transformers.",
        )
    return quantised_by(method)


def _rope(folder: Path, options: SglangOptions) -> dict[str, Any]:
    if options.rope_scaling is None:
        return {}
    try:
        given = json.loads(options.sglang_config.get("json_model_override_args") or "{}")
    except (TypeError, ValueError) as error:
        raise ConfigurationError("sglang_config: json_model_override_args must be JSON text.") from error
    changed, _ = overridden(folder, options.rope_scaling, trust_remote_code=options.trust_remote_code)
    return {"json_model_override_args": json.dumps({**given, **changed})}


def _gives_scores(folder: Path) -> bool:
    """Whether SGLang's classify path gives this model's scores: it can't generate then."""
    return is_classifier(folder) or any(name.endswith("RewardModel") for name in architectures(folder))
