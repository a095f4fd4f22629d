"""What HTTP costs over the fleet's own client: latency, gaps, rate and CPU, all sides in one run.

    python -m bench.gateway [--loads 1,32,256,256-slow] [--litellm PYTHON] [--json FILE]

Sides: the fleet's Python client; the gateway before the same fleet; a bare FastAPI application with the same scripted
engine in its process (the floor of HTTP in Python); and, with ``--litellm``, LiteLLM's proxy (of that interpreter's
environment) before that application. Jobs start on a fixed schedule, latencies count from the *scheduled* time. A gap
is the time between deliveries to the client: a delivery may hold several tokens, if they were late.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bench.overhead import Figures, Load, cpu_s, engine_options, figures, paced
from tokenfleet import AsyncClient
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.events import Delta
from tokenfleet.wire.local_files import LocalFleetConfig

LOADS = {
    "1": Load(1, 25, 128, 20.0, 5.0),
    "32": Load(32, 4, 128, 20.0, 5.0),
    # Long enough that all run at once: 50 begin a second (a Celery worker takes fewer than 200).
    "256": Load(256, 1, 1280, 20.0, 5.0),
    "256-slow": Load(256, 1, 500, 20.0, 20.0),
}
One = Callable[[str, float], Awaitable[list[float]]]


@dataclass
class Side:
    figures: Figures
    server_us: float
    """CPU per token of the process that serves HTTP, in microseconds (0 for the client, which has none)."""
    client_us: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_client(port: int, load: Load, key: str = "none") -> One:
    """Streams chats over plain sockets, parsing less than any real client: this process is not to set the pace."""

    async def one(prompt: str, scheduled: float) -> list[float]:
        body = json.dumps({
            "model": "scripted", "messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 0,
            "max_tokens": load.tokens,
        }).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        head += f"Authorization: Bearer {key}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        arrivals: list[float] = []
        tail = b""
        while data := await reader.read(1 << 16):
            now = time.perf_counter()
            if b'"content":' in data:
                arrivals.append(now)
            tail = (tail + data)[-200:]
        writer.close()
        assert b"[DONE]" in tail, tail
        return arrivals

    return one


async def measured(load: Load, one: One, server: psutil.Process | None) -> Side:
    await one("warm", time.perf_counter())
    pids = [os.getpid(), *([server.pid] if server else [])]
    before = [cpu_s(pid) for pid in pids]
    jobs = await paced(load, one)
    after = [cpu_s(pid) for pid in pids]
    tokens = load.streams * load.jobs * load.tokens
    us = [(b - a) * 1e6 / tokens for a, b in zip(before, after, strict=True)]
    return Side(figures(load, jobs), round(us[1], 1) if server else 0.0, round(us[0], 1))


@contextlib.contextmanager
def running(
    command: list[str], port: int, env: dict[str, str] | None = None, path: str = "/health"
) -> Iterator[psutil.Process]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
                    break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[:4]} does not serve:\n{log.read()[-2000:].decode()}")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def fleet_of(load: Load) -> AsyncIterator[tuple[str, str]]:
    config = LocalFleetConfig(
        worker={"model": "scripted", "engine": "scripted", "engine_args": engine_options(load), "slots": 512},
        persistent=False,
    )
    with ensure(config=config, private=True) as local:
        local.wait_ready()
        yield local.url, local.fleet


async def fleet_sides(load: Load) -> dict[str, Side]:
    async with fleet_of(load) as (url, name):
        async with AsyncClient(url, fleet=name, model="scripted") as client:

            async def one(prompt: str, scheduled: float) -> list[float]:
                job = await client.submit(prompt, do_sample=False, max_new_tokens=load.tokens)
                arrivals: list[float] = []
                async with job.stream() as stream:
                    while batch := await stream.next_batch():
                        if any(isinstance(event, Delta) for _, event in batch):
                            arrivals.append(time.perf_counter())
                return arrivals

            own = await measured(load, one, None)
        port = free_port()
        env = {
            "TOKENFLEET_GATEWAY_REDIS_URL": url,
            "TOKENFLEET_GATEWAY_FLEET": name,
            "TOKENFLEET_GATEWAY_PORT": str(port),
        }
        with running([sys.executable, "-m", "tokenfleet.producer.gateway.serve"], port, env) as server:
            through = await measured(load, http_client(port, load), server)
    return {"fleet's client": own, "gateway": through}


async def floor_sides(load: Load, litellm: str | None) -> dict[str, Side]:
    port = free_port()
    command = [sys.executable, "-m", "bench.gateway_floor", str(port), json.dumps(engine_options(load))]
    with running(command, port) as server:
        sides = {"bare FastAPI": await measured(load, http_client(port, load), server)}
        if litellm:
            sides["LiteLLM before it"] = await litellm_side(load, litellm, port)
    return sides


async def litellm_side(load: Load, python: str, upstream: int) -> Side:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        config = Path(folder) / "config.yaml"
        target = {"model": "openai/scripted", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
        key = f"sk-{secrets.token_hex(16)}"  # it does not start without
        served = {"model_list": [{"model_name": "scripted", "litellm_params": target}]}
        config.write_text(json.dumps({**served, "general_settings": {"master_key": key}}))
        command = [
            str(Path(python).parent / "litellm"),
            "--config",
            str(config),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        with running(command, port, path="/health/liveliness") as server:
            return await measured(load, http_client(port, load, key), server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--litellm", metavar="PYTHON", help="An interpreter whose environment has litellm[proxy].")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}")  # fmt: skip
    report: dict[str, dict[str, object]] = {}
    for name in args.loads.split(","):
        load = LOADS[name]
        sides = asyncio.run(fleet_sides(load)) | asyncio.run(floor_sides(load, args.litellm))
        print(f"\n{load}")
        for label, side in sides.items():
            print(f"  {label:18} {side.figures}  server {side.server_us} us/token, client {side.client_us}")
        added = sides["gateway"].figures.ttft_p50_ms - sides["fleet's client"].figures.ttft_p50_ms
        print(f"  gateway over the fleet's own client: TTFT p50 {added:+.2f} ms")
        report[name] = {"load": asdict(load), **{label: asdict(side) for label, side in sides.items()}}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
