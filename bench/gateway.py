"""What HTTP costs over the fleet's own client: latency, gaps, rate and CPU, all sides in one run.

    python -m bench.gateway [--loads 1x5,32x5,…] [--litellm PYTHON | --vllm PYTHON] [--json FILE]

A load is streams x milliseconds a token. Sides: the fleet's Python client; the gateway before the same fleet; a bare
FastAPI application with the same scripted engine in its process (the floor of HTTP in Python); and, with
``--litellm``, LiteLLM's proxy (of that interpreter's environment) before that application. ``--vllm PYTHON`` measures
``vllm serve`` and the gateway with a vLLM worker instead, both of that interpreter's environment. Jobs start on a fixed
schedule, latencies count from the *scheduled* time. A gap is the time between deliveries to the client: a delivery may
hold several tokens, if they were late. All clients here run on uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from bench import gateway_vllm
from bench.gateway_sides import Side, free_port, http_client, measured, running
from bench.overhead import Load, engine_options
from tokenfleet import AsyncClient
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.events import Delta
from tokenfleet.wire.local_files import LocalFleetConfig

T = TypeVar("T")
LITELLM_TOKENS = 128
"""At most, of a stream: it may be far from keeping pace, and one of the long streams' loads would take minutes."""
DEFAULT = "1x5,32x5,64x5,128x5,256x5,64x20,128x20,256x20"


def load_of(name: str) -> Load:
    """``256x5``. Many streams run long enough to be all there at once: 50 begin a second, since a Celery worker takes
    fewer than 200."""
    streams, token_ms = map(int, name.split("x"))
    if streams == 1:
        return Load(1, 25, 128, 20.0, token_ms)
    if streams <= 32:
        return Load(streams, 4, 128, 20.0, token_ms)
    return Load(streams, 1, round((streams * 20 + 4000) / token_ms), 20.0, token_ms)


@asynccontextmanager
async def fleet_of(load: Load) -> AsyncIterator[tuple[str, str, dict[str, list[int]]]]:
    config = LocalFleetConfig(
        worker={"model": "scripted", "engine": "scripted", "engine_args": engine_options(load), "slots": 512},
        persistent=False,
    )
    with ensure(config=config, private=True) as local:
        state = local.wait_ready()
        yield local.url, local.fleet, {"worker": [w.pid for w in state.workers], "Redis": [state.redis_pid]}


async def fleet_sides(load: Load) -> dict[str, Side]:
    async with fleet_of(load) as (url, name, processes):
        async with AsyncClient(url, fleet=name, model="scripted") as client:

            async def one(prompt: str, scheduled: float) -> list[float]:
                job = await client.submit(prompt, do_sample=False, max_new_tokens=load.tokens)
                arrivals: list[float] = []
                async with job.stream() as stream:
                    while batch := await stream.next_batch():
                        if any(isinstance(event, Delta) for _, event in batch):
                            arrivals.append(time.perf_counter())
                return arrivals

            own = await measured(load, one, processes)
        port = free_port()
        env = {
            "TOKENFLEET_GATEWAY_REDIS_URL": url,
            "TOKENFLEET_GATEWAY_FLEET": name,
            "TOKENFLEET_GATEWAY_PORT": str(port),
        }
        with running([sys.executable, "-m", "tokenfleet.producer.gateway.serve"], port, env) as server:
            through = await measured(load, http_client(port, load), {**processes, "HTTP": server})
    return {"fleet's client": own, "gateway": through}


async def floor_sides(load: Load, litellm: str | None) -> dict[str, Side]:
    port = free_port()
    command = [sys.executable, "-m", "bench.gateway_floor", str(port), json.dumps(engine_options(load))]
    with running(command, port) as server:
        sides = {"bare FastAPI": await measured(load, http_client(port, load), {"HTTP": server})}
        if litellm:
            short = replace(load, tokens=min(load.tokens, LITELLM_TOKENS))
            sides["LiteLLM before it"] = await litellm_side(short, litellm, port)
    return sides


async def litellm_side(load: Load, python: str, upstream: int) -> Side:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        config = Path(folder) / "config.yaml"
        target = {"model": "openai/scripted", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
        key = f"sk-{secrets.token_hex(16)}"  # it does not start without
        served = {"model_list": [{"model_name": "scripted", "litellm_params": target}]}
        config.write_text(json.dumps({**served, "general_settings": {"master_key": key}}))
        command = [str(Path(python).parent / "litellm"), "--config", str(config), "--port", str(port)]
        with running([*command, "--host", "127.0.0.1"], port, path="/health/liveliness") as server:
            return await measured(load, http_client(port, load, key), {"HTTP": server})


def on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def told(load: Load, sides: dict[str, Side]) -> dict[str, object]:
    """Print one load's sides; what goes into the report."""
    print(f"\n{time.strftime('%Y-%m-%d %H:%M')}, {load}, load average {os.getloadavg()[0]:.1f}")
    for label, side in sides.items():
        print(f"  {label:18} {side}")
    if "gateway" in sides and "fleet's client" in sides:
        added = sides["gateway"].figures.ttft_p50_ms - sides["fleet's client"].figures.ttft_p50_ms
        print(f"  gateway over the fleet's own client: TTFT p50 {added:+.2f} ms", flush=True)
    return {"load": asdict(load), **{label: asdict(side) for label, side in sides.items()}}


def _keep(report: dict[str, dict[str, object]], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", default=DEFAULT, help="Streams x ms a token, comma-separated.")
    parser.add_argument("--litellm", metavar="PYTHON", help="An interpreter whose environment has litellm[proxy].")
    parser.add_argument("--without-floor", action="store_true", help="The fleet's two sides only.")
    parser.add_argument("--vllm", metavar="PYTHON", help="An interpreter whose environment has tokenfleet and vLLM.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}")  # fmt: skip
    report: dict[str, dict[str, object]] = {}
    if args.vllm:
        python, streams = gateway_vllm.check(args.vllm), list(gateway_vllm.LOADS)
        served = on_uvloop(gateway_vllm.vllm_sides(python, streams))
        fleet = on_uvloop(gateway_vllm.gateway_sides(python, streams))
        for k in streams:
            report[str(k)] = told(gateway_vllm.LOADS[k], {"vllm serve": served[k], "gateway": fleet[k]})
        _keep(report, args.json)
        args.loads = ""
    for name in filter(None, args.loads.split(",")):
        load = load_of(name)
        sides = on_uvloop(fleet_sides(load))
        if not args.without_floor:
            sides |= on_uvloop(floor_sides(load, args.litellm))
        report[name] = told(load, sides)
        _keep(report, args.json)


if __name__ == "__main__":
    main()
