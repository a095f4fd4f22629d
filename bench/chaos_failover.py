"""What a failover costs, and what waiting for replicas costs while nothing fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.chaos_report import percentile
from tests.fleets import ROOT, Fleet
from tests.sentinels import ReplicatedRedis, replicated
from tests.servers import new_fleet_name

SUBMITS, STREAMS, TOKENS = 300, 16, 200


def wait_cost() -> str:
    """A paragraph of Markdown: the same fleet on a master with two replicas, without and with ``?replicas=1``."""
    rows = []
    for replicas in (0, 1, 0, 1):
        with (
            replicated(new_fleet_name(), replicas=2, sentinels=1) as cluster,
            tempfile.TemporaryDirectory(prefix="tf-wait-") as folder,
        ):
            cluster.replicas = replicas
            rows.append(_measured(cluster, Path(folder)))
    pairs = ["| | submit p50 / p99 | first token p50 / p99 | between tokens p50 / p99 |", "|---|---|---|---|"]
    for replicas in (0, 1):
        runs = rows[replicas::2]
        cells = []
        for k in range(3):
            values = [value for run in runs for value in run[k]]
            cells.append(f"{percentile(values, 50):.1f} / {percentile(values, 99):.1f} ms")
        pairs.append(f"| {'`?replicas=1`' if replicas else 'not waiting'} | {' | '.join(cells)} |")
    return (
        f"Waiting for a replica (`python -m bench.chaos wait_cost`): one master with two replicas on this machine, "
        f"{SUBMITS} submits one after the other, then {STREAMS} streams of {TOKENS} tokens at 20 ms a token; two runs "
        f"of each, by turns. Over a network each wait costs its round trip.\n\n" + "\n".join(pairs)
    )


def crash_points() -> str:
    """A paragraph: worker and producer die before and after every single call that they make to Redis."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--timeout=1200", "tests/faults/test_crash_points.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TOKENFLEET_CRASH_POINTS_EVERY": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    told = [line.lstrip(".F") for line in done.stdout.splitlines() if line.lstrip(".F").startswith("died ")]
    outcome = "no violation" if done.returncode == 0 else "FAILED"
    by_role = [", ".join(told[k : k + 2]) for k in (0, 2)]
    return (
        f"Crash points (`python -m bench.chaos crash_points`): {outcome}; worker: {by_role[0]}; producer: {by_role[1]}."
    )


def _measured(cluster: ReplicatedRedis, folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds: of each submit, until first tokens, between batches of tokens."""
    fleet = Fleet(cluster, folder)  # type: ignore[arg-type]
    submits: list[float] = []
    firsts: list[float] = []
    gaps: list[float] = []
    try:
        fleet.start_worker(token_ms=20.0, record_path=None)
        client = fleet.client(model="scripted")

        async def submit_all() -> None:
            for _ in range(SUBMITS):
                began = time.perf_counter()
                job = await client.aio.submit("count", max_new_tokens=1)
                submits.append(1000 * (time.perf_counter() - began))
            await job.result(60)

        async def read_one() -> None:
            last = began = time.perf_counter()
            job = await client.aio.submit("count", max_new_tokens=TOKENS)
            async with job.stream() as stream:
                while batch := await stream.next_batch():
                    if not any(type(event).__name__ == "Delta" for _, event in batch):
                        continue
                    now = time.perf_counter()
                    (gaps if last != began else firsts).append(1000 * (now - last))
                    last = now

        async def read_all() -> None:
            await asyncio.gather(*(read_one() for _ in range(STREAMS)))

        client.thread.run(submit_all())
        client.thread.run(read_all())
    finally:
        fleet.close()
    return submits, firsts, gaps
