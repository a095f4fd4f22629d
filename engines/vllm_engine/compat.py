"""Where vLLM's releases differ. Run with 0.26 (GPU) and 0.32 (CPU); the ways of 0.33 were read, not run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

_ENVIRONMENT = {
    # A fork of a process with an event loop, Celery's threads and open Redis connections inherits all of them.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    # Its top-k and top-p draw by rejection: another distribution of seeds, and it compiles at the first request.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # A core told to leave waits so long for its worker, in vain; what is left of them leaves with us (lifeline).
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    # Without this the engine core pins itself to cores, on a small machine to the very one that the worker runs on.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

is_front_end = False
"""Whether this is the process that holds the engine, not one that vLLM spawned."""


def prepare_environment() -> None:
    """vLLM is configured by environment variables, here and in its children; who set one has the last word."""
    global is_front_end
    is_front_end = True
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def may_use_v2() -> bool:
    """Whether vLLM may choose its model runner V2 for a model: where our part of the sampling fits in (`sampler_v2`).
    Otherwise V1 is what it is told to use, here and in its children."""
    from vllm.platforms import current_platform

    from tokenfleet.engines.vllm_engine import sampler_v2

    if current_platform.is_cpu() or not sampler_v2.fits():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


def uses_v2(config: Any) -> bool:
    """``config``: a `VllmConfig` made with no logits processors; if it chose V1, that is final."""
    if not config.use_v2_model_runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return bool(config.use_v2_model_runner)


def token_prompt(ids: list[int]) -> Any:
    """Ready token ids as `AsyncLLM.generate` takes them without another thread's help."""
    try:
        from vllm.inputs import tokens_input
    except ImportError:  # before 0.30 or so: a plain prompt
        return {"prompt_token_ids": ids}
    return tokens_input(ids)


def parsed_prompt(model_config: Any, prompt: Mapping[str, Any]) -> Any:
    """A prompt with media as vLLM's renderer takes it."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    return parse_model_prompt(model_config, prompt)


def place_videos(made: Any, seconds: Sequence[float]) -> None:
    """Correct in ``made``, the renderer's engine input, how long a step of each video's grid lasts, if the model is
    told that: Qwen2.5-VL's positions follow from it. 0.26 takes 24 frames a second for granted. The name under which
    vLLM keeps what it computed for a video tells rates apart, too."""
    import torch

    videos = list(made.get("mm_kwargs", {}).get("video", ()))
    names = list(made.get("mm_hashes", {}).get("video", ()))
    wrong = False
    for number, (video, right) in enumerate(zip(videos, seconds, strict=bool(videos))):
        element = video and video.get("second_per_grid_ts")
        if element and not math.isclose(float(element.data), right, rel_tol=1e-3):
            changed = replace(element, data=torch.tensor(right))
            videos[number] = type(video)({**video, "second_per_grid_ts": changed})
            names[number] += f"@{right:.6f}"
            wrong = True
    if wrong:
        made["mm_kwargs"]["video"], made["mm_hashes"]["video"] = videos, names


def structured_outputs(**constraint: str) -> Mapping[str, Any]:
    """The keyword argument of `SamplingParams` that holds it to a grammar. Raises `ValueError` or vLLM's own error."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**constraint)}


def request_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that is wrong. 0.26 raises plain `ValueError`s."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:
        return (ValueError, TypeError)
    return (VLLMClientError, ValueError, TypeError)


def want_output_ids_only_if_needed() -> None:
    """In the engine core: let the model runner keep the requests' output ids up to date only while one of our
    processors has a request that reads them (`reads_output_ids`), as it does for its own penalties. Otherwise any
    processor makes every step wait for the ids of the one before (`InputBatch.logitsprocs_need_output_token_ids`)."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    def is_needed(batch: Any) -> bool:
        return any(
            getattr(processor, "reads_output_ids", not type(processor).__module__.startswith("vllm."))
            for processor in batch.logitsprocs.all
        )

    def set_by_runner(batch: Any, value: bool) -> None:
        """It says only whether there are processors beside vLLM's own."""

    InputBatch.logitsprocs_need_output_token_ids = property(is_needed, set_by_runner)
