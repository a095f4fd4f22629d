"""No-op tasks through the asyncio pool and through Celery's ``threads`` pool: rate, latency and CPU, in one run.

    python -m bench.pool [--tasks 1000] [--rounds 3] [--slots 1,16]

For each number of slots and each round, each pool gets a worker of its own on the same server, in turn.

rate      ``--tasks`` messages wait in the queue, then the worker may consume: tasks/s until the last one is acked
cpu       the worker process' CPU time over that, in ms a task
latency   50 tasks/s on a fixed schedule: from the *scheduled* time of ``apply_async`` to the task's body, in ms
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import redis
from celery import Celery

from tokenfleet.wire.urls import to_celery
from tokenfleet.workers import lifeline
from tokenfleet.workers.embedded_server import EmbeddedServer

POOLS = {"asyncio": "tokenfleet.workers.pool:AsyncioPool", "threads": "threads"}
PACED_TASKS, PACE_S = 200, 0.02
LIMIT_S = 120.0

app = Celery("bench", broker=os.environ.get("BENCH_BROKER"), backend=os.environ.get("BENCH_BROKER"))
app.conf.update(
    worker_pool=os.environ.get("BENCH_POOL", "threads"),
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    task_default_queue="work",
    broker_connection_retry_on_startup=True,
)
_began: list[float] = []  # in the worker


@app.task(name="bench.pool.noop_asyncio")  # named: one side imports this file, the other runs it
async def noop_asyncio() -> None:
    _began.append(time.time())


@app.task(name="bench.pool.noop_threads")
def noop_threads() -> None:
    _began.append(time.time())


@app.task(name="bench.pool.report", ignore_result=False)
def report() -> list[float]:
    began = list(_began)
    _began.clear()
    return began


@dataclass
class Round:
    rate: float
    cpu_ms: float
    latency_p50_ms: float
    latency_p99_ms: float


def measure(pool: str, slots: int, tasks: int, server: EmbeddedServer) -> Round:
    environment = {**os.environ, "BENCH_BROKER": to_celery(server.url), "BENCH_POOL": POOLS[pool]}
    command = [sys.executable, "-m", "celery", "-A", "bench.pool", "worker", "-c", str(slots), "-l", "ERROR"]
    client = server.client()
    noop = {"asyncio": noop_asyncio, "threads": noop_threads}[pool]
    with tempfile.TemporaryFile() as log:
        worker = lifeline.spawn([*command, "--without-gossip", "--without-mingle"], env=environment, output=log)
        try:
            for _ in range(20):  # it is up, and its code paths are warm
                noop.delay()
            report.delay().get(timeout=LIMIT_S)
            app.control.cancel_consumer("work", reply=True, timeout=2.0, limit=1)
            for _ in range(tasks):
                noop.delay()
            cpu_before = cpu_s(worker.pid)
            began = time.perf_counter()
            app.control.add_consumer("work")
            until(lambda: not client.llen("work") and not client.hlen("unacked"))
            elapsed_s = time.perf_counter() - began
            cpu_ms = (cpu_s(worker.pid) - cpu_before) * 1000 / tasks
            report.delay().get(timeout=LIMIT_S)
            latencies = paced(noop.delay)
        finally:
            worker.kill()
            client.close()
    return Round(tasks / elapsed_s, cpu_ms, latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)])


def paced(send: Callable[[], object]) -> list[float]:
    """Sorted latencies in ms. One slot or many: at this pace the tasks run in the order in which they were sent."""
    scheduled = [time.time() + 0.1 + k * PACE_S for k in range(PACED_TASKS)]
    for at in scheduled:
        time.sleep(max(0.0, at - time.time()))
        send()
    time.sleep(0.5)
    began = report.delay().get(timeout=LIMIT_S)
    return sorted((b - a) * 1000 for a, b in zip(scheduled, sorted(began), strict=True))


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("the worker did not get through its tasks")
        time.sleep(0.005)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def surroundings(client: redis.Redis) -> str:
    info = client.info()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    packages = " ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "hiredis", "greenlet"))
    return (
        f"{os.cpu_count()} x {model.partition(':')[2].strip()}, load {os.getloadavg()[0]:.1f}, "
        f"{platform.system()} {platform.release()}\n"
        f"Python {platform.python_version()} {packages} "
        f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}, unix socket"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", default="1,16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        server = EmbeddedServer(Path(folder), settings={"appendonly": "no"})
        server.start()
        app.conf.broker_url = app.conf.result_backend = to_celery(server.url)
        with server.client(decode_responses=True) as client:
            print(surroundings(client))
        print(f"{options.tasks} tasks a round, {options.rounds} rounds; median (lowest-highest)")
        print(f"{'slots':>5} {'pool':>8} {'tasks/s':>18} {'cpu ms/task':>18} {'p50 ms':>18} {'p99 ms':>18}")
        for slots in map(int, options.slots.split(",")):
            rounds: dict[str, list[Round]] = {pool: [] for pool in POOLS}
            for _ in range(options.rounds):
                for pool in POOLS:
                    rounds[pool].append(measure(pool, slots, options.tasks, server))
            for pool, seen in rounds.items():
                columns = zip(*([r.rate, r.cpu_ms, r.latency_p50_ms, r.latency_p99_ms] for r in seen), strict=True)
                cells = [f"{statistics.median(c):.4g} ({min(c):.4g}-{max(c):.4g})" for c in columns]
                print(f"{slots:>5} {pool:>8} " + " ".join(f"{cell:>18}" for cell in cells), flush=True)
        server.stop()


if __name__ == "__main__":
    main()
