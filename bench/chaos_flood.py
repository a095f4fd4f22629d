"""More jobs than the queue takes, from several producers at once: ``python -m bench.chaos_flood URL FLEET FOLDER JOBS``
is one of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from bench.chaos_report import Row
from bench.chaos_run import Run, Scale, judged, streaming
from tests.faults.trial import History
from tests.fleets import ROOT, wait_until
from tokenfleet.producer.aio import AsyncClient
from tokenfleet.wire.errors import Overloaded
from tokenfleet.wire.keys import new_id

PRODUCERS, IN_FLIGHT, MAX_QUEUED, TOKENS = 4, 16, 1000, 3


def flood(scale: Scale, seed: int) -> Row:
    """As fast as the producers can, with a kill in the middle: each job ends or is refused, and none runs twice."""
    with streaming(Scale(streams=1, token_ms=5.0, tokens=600), seed) as run:
        run.trial.until_over(30)
        run.start()  # so that one is left whichever is killed
        started = time.monotonic()
        producers = [_producer(run, scale.flood // PRODUCERS) for _ in range(PRODUCERS)]
        wait_until(lambda: len(_lines(run)) >= scale.flood // 2, 120, "half of the flood")
        run.fault("SIGKILL", cuts=False)
        run.busiest().kill_group()
        run.start(wait=False)
        assert [producer.wait(300) for producer in producers] == [0] * PRODUCERS, "a producer failed"
        lines = _lines(run)
        took_s = max(line["t"] for line in lines) - min(line["t"] for line in lines)
        taken = [run.trial.client.job(line["job"]) for line in lines if line["kind"] == "accepted"]
        run.trial.watch(taken)
        row = judged(run, f"flood of {scale.flood:,} jobs from {PRODUCERS} producers, one kill", seed, scale.flood)
        answered = f"{len(taken)} taken, {len(lines) - len(taken)} refused in {took_s:.1f} s"
        whole_s = time.monotonic() - started
        row.notes = row.notes or f"{answered}; all read to their ends after {whole_s:.0f} s"
        return row


def _producer(run: Run, jobs: int) -> subprocess.Popen[bytes]:
    redis, folder = run.fleet.redis, str(run.fleet.folder)
    command = [sys.executable, "-m", "bench.chaos_flood", redis.url, redis.fleet, folder, str(jobs)]
    return subprocess.Popen(command, cwd=ROOT)


def _lines(run: Run) -> list[dict]:
    """What the producers were answered."""
    files = run.fleet.folder.glob("history-flood-*.jsonl")
    whole = [line for file in files for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [msgspec.json.decode(line) for line in whole]


async def _produce(url: str, fleet: str, folder: Path, jobs: int) -> None:
    history = History(folder, f"flood-{time.monotonic_ns()}")
    numbers = iter(range(jobs))

    async def lane(client: AsyncClient) -> None:
        for number in numbers:
            job_id = new_id()
            try:
                await client.submit(f"question {number}", max_new_tokens=TOKENS, job_id=job_id)
            except Overloaded as error:
                history.note("refused", code=error.code, job=job_id)
            else:
                history.note("accepted", job=job_id, n=1, max_new_tokens=TOKENS)

    async with AsyncClient(url, fleet=fleet, model="scripted", max_queued=MAX_QUEUED) as client:
        await asyncio.gather(*(lane(client) for _ in range(IN_FLIGHT)))
    history.close()


if __name__ == "__main__":
    asyncio.run(_produce(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
