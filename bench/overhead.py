"""What the fleet costs over the bare engine: latency, CPU and round trips, both sides in one run.

    python -m bench.overhead [--streams 1,32,256] [--json FILE]

Both sides use the same scripted engine. Jobs start on a fixed schedule, and all latencies count from the *scheduled*
time, so that a stall can't hide by delaying what comes after it. The bare side runs engine and detokeniser in this
process; the fleet side runs a Redis-compatible server and one Celery worker, with this process as its client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import redis

from tokenfleet import AsyncClient
from tokenfleet.engines.generation import GenerationJob, generate_deltas
from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire import urls
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.events import Delta
from tokenfleet.wire.local_files import LocalFleetConfig


@dataclass(frozen=True)
class Load:
    """``streams`` at once; each runs ``jobs`` one after the other, started every ``period_s``."""

    streams: int
    jobs: int
    tokens: int
    ttft_ms: float
    token_ms: float

    @property
    def period_s(self) -> float:
        return (self.ttft_ms + self.tokens * self.token_ms) / 1000 + 0.1


LOADS = {
    1: Load(1, 25, 64, 20.0, 5.0),
    32: Load(32, 3, 150, 20.0, 20.0),
    256: Load(256, 1, 500, 20.0, 20.0),
}


@dataclass
class Seen:
    """Arrival times of one job's tokens, in seconds after its scheduled start."""

    arrivals: list[float] = field(default_factory=list)


@dataclass
class Figures:
    """Medians and spreads in ms, of one side."""

    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    rate: float
    """Of what the token clock allows."""


Start = Callable[[str, Load], Awaitable[list[float]]]


async def paced(load: Load, one: Callable[[str, float], Awaitable[list[float]]]) -> list[list[float]]:
    """Run the load; ``one(prompt, scheduled)`` returns arrival times of tokens on `time.perf_counter`'s clock."""
    begin = time.perf_counter() + 0.2
    results: list[list[float]] = []

    async def stream(index: int) -> None:
        for k in range(load.jobs):
            # 50 starts a second: Celery itself takes fewer than 200 tasks a second on these machines.
            scheduled = begin + k * load.period_s + index * 0.02
            await asyncio.sleep(max(0.0, scheduled - time.perf_counter()))
            arrivals = await one(f"stream {index} job {k}", scheduled)
            results.append([t - scheduled for t in arrivals])

    await asyncio.gather(*(stream(i) for i in range(load.streams)))
    return results


def figures(load: Load, jobs: list[list[float]]) -> Figures:
    ttfts = sorted(job[0] * 1000 for job in jobs)
    gaps = sorted((b - a) * 1000 for job in jobs for a, b in itertools.pairwise(job))
    # Of the stream itself: what came late at its start is in TTFT.
    rates = [(load.tokens - 1) * load.token_ms / 1000 / (job[-1] - job[0]) for job in jobs]

    def at(values: list[float], share: float) -> float:
        return round(values[min(len(values) - 1, int(len(values) * share))], 3)

    return Figures(at(ttfts, 0.5), at(ttfts, 0.99), at(gaps, 0.5), at(gaps, 0.99), round(statistics.mean(rates), 4))


def engine_options(load: Load) -> dict[str, float | int]:
    return {"ttft_ms": load.ttft_ms, "token_ms": load.token_ms, "slots": 512}


async def bare(load: Load) -> tuple[Figures, float]:
    """The engine in this process. Also its CPU per token, in microseconds."""
    engine = ScriptedEngine(ScriptedOptions.model_validate(engine_options(load)))
    await engine.start()
    params = GenerationParams(do_sample=False, max_new_tokens=load.tokens)

    async def one(prompt: str, scheduled: float) -> list[float]:
        ids = tuple(engine.tokenizer.encode(prompt))
        job = GenerationJob(f"{prompt}-{scheduled}", 1, ids, params, load.tokens)
        arrivals: list[float] = []
        async for event in generate_deltas(engine, engine.tokenizer, job):
            if isinstance(event, Delta):
                arrivals += [time.perf_counter()] * len(event.ids)
        return arrivals

    before = time.process_time()
    jobs = await paced(load, one)
    cpu_us = (time.process_time() - before) * 1e6 / (load.streams * load.jobs * load.tokens)
    await engine.close()
    return figures(load, jobs), cpu_us


@dataclass
class Costs:
    """Per token, in microseconds of CPU; requests on all sockets per 1,000 tokens."""

    worker_us: float
    worker_outside_engine_us: float
    redis_us: float
    client_us: float
    requests_per_1000: float


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def requests(server: redis.Redis) -> int:
    """Requests on all sockets so far, Celery's included. A transaction counts as each of its commands.

    ``tot-cmds`` of a connection counts what scripts do inside too, so script callers' requests are taken from the
    command statistics: scripts themselves never call any of these."""
    stats = server.info("commandstats")
    by_scripts = sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval", "xrange"))
    callers = ("evalsha", "eval", "xrange", "client", "info")
    return by_scripts + sum(int(c["tot-cmds"]) for c in server.client_list() if c["cmd"].split("|")[0] not in callers)


async def fleet(load: Load, engine_us: float) -> tuple[Figures, Costs]:
    config = LocalFleetConfig(
        worker={"model": "scripted", "engine": "scripted", "engine_args": engine_options(load), "slots": 512},
        persistent=False,
    )
    with ensure(config=config, private=True) as local:
        state = local.wait_ready()
        server = urls.connect(local.url, decode_responses=True)
        async with AsyncClient(local.url, fleet=local.fleet, model="scripted") as client:

            async def one(prompt: str, scheduled: float) -> list[float]:
                job = await client.submit(prompt, do_sample=False, max_new_tokens=load.tokens)
                arrivals: list[float] = []
                async with job.stream() as stream:
                    while batch := await stream.next_batch():
                        now = time.perf_counter()
                        arrivals += [now for _, e in batch if isinstance(e, Delta) for _ in e.ids]
                return arrivals

            await one("warm", time.perf_counter())
            worker = state.workers[0].pid
            pids = [worker, state.redis_pid, os.getpid()]
            before, asked = [cpu_s(pid) for pid in pids], requests(server)
            jobs = await paced(load, one)
            after, sent = [cpu_s(pid) for pid in pids], requests(server) - asked
        tokens = load.streams * load.jobs * load.tokens
        us = [(b - a) * 1e6 / tokens for a, b in zip(before, after, strict=True)]
        costs = Costs(*(round(x, 1) for x in (us[0], us[0] - engine_us, us[1], us[2], sent * 1000 / tokens)))
        server.close()
        return figures(load, jobs), costs


def celery_noop(count: int = 100) -> float:
    """Median ms from ``apply_async`` to the body of a no-op task, on Celery's own thread pool."""
    from bench import noop_app

    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        from tokenfleet.workers.embedded_server import EmbeddedServer

        server = EmbeddedServer(Path(folder))
        server.start()
        env = {**os.environ, "NOOP_URL": urls.to_celery(server.url)}
        command = [sys.executable, "-m", "celery", "-A", "bench.noop_app", "worker", "-P", "threads", "-c", "4"]
        worker = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            noop_app.configure(env["NOOP_URL"])
            client = urls.connect(server.url)
            latencies = []
            for k in range(count + 1):
                sent = time.time()
                noop_app.noop.apply_async()
                _, began = client.brpop(["noop:began"], timeout=60)
                if k:  # the first one waits for the worker to come up
                    latencies.append((float(began) - sent) * 1000)
                time.sleep(0.1)  # as long as the one stream pauses between its jobs: an idle machine wakes slowly
            client.close()
        finally:
            worker.kill()
            worker.wait()
            server.kill()
    return round(statistics.median(latencies), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}")  # fmt: skip
    noop = celery_noop()
    print(f"Celery no-op task, apply_async to body, threads pool: p50 {noop} ms")
    report: dict[str, object] = {"celery_noop_p50_ms": noop}
    for streams in map(int, args.streams.split(",")):
        load = LOADS[streams]
        alone, engine_us = asyncio.run(bare(load))
        with_fleet, costs = asyncio.run(fleet(load, engine_us))
        print(f"\n{load}\n  engine alone {alone} ({engine_us:.1f} us of CPU a token)")
        print(f"  fleet        {with_fleet}\n  {costs}")
        print(
            f"  added: TTFT p50 {with_fleet.ttft_p50_ms - alone.ttft_p50_ms:+.2f} ms, "
            f"gap p50 {with_fleet.gap_p50_ms - alone.gap_p50_ms:+.2f} ms, "
            f"rate {with_fleet.rate / alone.rate:.4f} of the engine's"
        )
        sides = {"load": load, "bare": alone, "fleet": with_fleet, "costs": costs}
        report[str(streams)] = {name: asdict(side) for name, side in sides.items()}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
