"""`bench.gateway --vllm PYTHON`: ``vllm serve`` beside the gateway with a vLLM worker: one model, one set of options.

One after the other: each has the machine to itself. The model is the built-in small one, in float32 on a CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from bench.gateway_sides import Side, free_port, http_client, measured, running
from bench.overhead import Load
from tokenfleet.engines.models import BUILTIN_MODEL, resolve
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.local_files import LocalFleetConfig
from tokenfleet.workers.supervisor_worker import CELERY_WORKER

# The times only space out one stream's jobs, which must not overlap: one core takes 90 ms a token.
LOADS = {streams: Load(streams, 4 if streams == 1 else 1, 64, 400.0, 150.0) for streams in (1, 8, 32)}
_CONTEXT, _SLOTS, _CACHE_BYTES = 1024, 32, 1 << 30
_START_S = 240.0
_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as tokenfleet's workers have it
    # A core for the model, the other for all that serves. Two threads would wait for one another, spinning, whenever
    # anything else runs: 200 ms of CPU a token instead of 26 at one stream.
    "OMP_NUM_THREADS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


async def gateway_sides(python: str, loads: Iterable[int]) -> dict[int, Side]:
    options = {
        "model_name_or_path": BUILTIN_MODEL, "infer_dtype": "float32", "max_batch_size": _SLOTS,
        "vllm_maxlen": _CONTEXT, "vllm_enforce_eager": True, "vllm_config": {"kv_cache_memory_bytes": _CACHE_BYTES},
    }  # fmt: skip
    config = LocalFleetConfig(
        worker={"model": BUILTIN_MODEL, "engine": "vllm", "engine_args": options},
        persistent=False,
        command=(python, *CELERY_WORKER[1:]),
    )
    os.environ.update(_ENV)  # the fleet's processes inherit it
    with ensure(config=config, private=True) as local:
        state = local.wait_ready(_START_S)
        port = free_port()
        env = {
            "TOKENFLEET_GATEWAY_REDIS_URL": local.url,
            "TOKENFLEET_GATEWAY_FLEET": local.fleet,
            "TOKENFLEET_GATEWAY_PORT": str(port),
        }
        with running([sys.executable, "-m", "tokenfleet.producer.gateway.serve"], port, env) as server:
            worker = [pid for w in state.workers for pid in _family(w.pid)]
            return await _all(port, loads, {"worker": worker, "Redis": [state.redis_pid], "HTTP": server})


async def vllm_sides(python: str, loads: Iterable[int]) -> dict[int, Side]:
    port = free_port()
    options = {
        "served-model-name": BUILTIN_MODEL, "dtype": "float32", "max-num-seqs": _SLOTS, "max-model-len": _CONTEXT,
        "kv-cache-memory-bytes": _CACHE_BYTES, "generation-config": "vllm", "host": "127.0.0.1", "port": port,
        "structured-outputs-config": json.dumps({"backend": "guidance"}),
    }  # fmt: skip
    # What `vllm serve` runs; that command itself looks for a distribution "vllm", and on a CPU it is "vllm-cpu".
    server_module = "vllm.entrypoints.openai.api_server"
    command = [python, "-m", server_module, "--model", str(resolve(BUILTIN_MODEL)), "--enforce-eager"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    with running(command, port, _ENV, wait_s=_START_S) as server:
        return await _all(port, loads, {"vllm serve": server})


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


async def _all(port: int, loads: Iterable[int], processes: dict[str, list[int]]) -> dict[int, Side]:
    sides = {}
    for streams in loads:
        one = http_client(port, LOADS[streams], model=BUILTIN_MODEL, ignore_eos=True)
        # vLLM compiles some of what a batch of a new size needs when it first meets one.
        await asyncio.gather(*(one(f"warm {k}", 0.0) for k in range(streams)))
        sides[streams] = await measured(LOADS[streams], one, processes)
        print(f"  {streams} streams: {sides[streams]}", flush=True)
    return sides


def check(python: str) -> str:
    """Its full path. Raises `SystemExit` unless it is an interpreter with tokenfleet and vLLM."""
    if not Path(python).exists():
        raise SystemExit(f"--vllm: there is no {python}")
    return str(Path(python).absolute())
