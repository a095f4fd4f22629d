"""Workers with vLLM or SGLang, whichever this environment has: `make test-vllm-cpu` and `make test-sglang-cpu`."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import psutil
import pytest

from tests.fleets import Fleet, Worker

MODEL = "smollm2-135m-instruct"
_START_S = 300
_OPTIONS: dict[str, dict[str, Any]] = {
    "vllm": {
        "vllm_maxlen": 1024, "vllm_enforce_eager": True, "vllm_config": {"kv_cache_memory_bytes": 1 << 29},
    },
    "sglang": {"sglang_maxlen": 1024, "sglang_config": {"max_total_tokens": 4096}},
}  # fmt: skip
_ON_GPU: dict[str, dict[str, Any]] = {
    "vllm": {
        "vllm_maxlen": 4096, "vllm_enforce_eager": True, "vllm_gpu_util": 0.25, "vllm_config": {},
        "infer_dtype": "float32",
    },
    "sglang": {
        "sglang_maxlen": 4096, "sglang_mem_fraction": 0.6, "infer_dtype": "float16",
        "sglang_config": {
            "max_total_tokens": 1 << 16, "attention_backend": "triton", "disable_prefill_cuda_graph": True,
            "cuda_graph_bs_decode": [1, 4, 8, 12],
        },
    },
}  # fmt: skip
"""Three workers share a card in the tests of kills; SGLang counts what the others take while it starts as its own."""
_CORES = {"vllm": "VLLM::EngineCore", "sglang": "sglang::scheduler"}
NAME = next((name for name in _OPTIONS if importlib.util.find_spec(name)), None)

needs_one = pytest.mark.skipif(
    NAME is None,
    reason="neither vllm nor sglang is installed, whose pins exclude this environment's: `make test-vllm-cpu`",
)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def start(fleet: Fleet, **more: Any) -> Worker:
    """A worker that loads the small model; `wait_ready` when it is to be there. ``more``: further options."""
    assert NAME is not None
    options = {"model_name_or_path": MODEL, "infer_dtype": "float32", "max_batch_size": 12, **_OPTIONS[NAME], **more}
    if has_gpu():
        options |= _ON_GPU[NAME]
    env = {"TOKENFLEET_MODEL": MODEL, "TOKENFLEET_ENGINE": NAME, "TOKENFLEET_ENGINE_ARGS": json.dumps(options)}
    return fleet.start_worker(wait=False, env=env)


def wait_ready(fleet: Fleet, *workers: Worker) -> None:
    for worker in workers:
        fleet.wait_ready(worker, fleet.workers.index(worker), _START_S)


def core_of(worker: Worker) -> psutil.Process:
    """The child process that computes: vLLM's engine core, SGLang's scheduler."""
    assert NAME is not None
    [core] = [child for child in worker.children() if _CORES[NAME] in " ".join(child.cmdline())]
    return core
