"""A fleet with two workers that streams while something is done to it, and what the checker says of it."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos_report import Row
from tests.faults.checker import Verdict
from tests.faults.trial import Trial, running
from tests.fleets import Fleet, Worker, wait_until
from tests.servers import RedisServer, new_fleet_name, running_server


@dataclass
class Scale:
    """How much of everything."""

    streams: int = 48
    kills: int = 8
    seeds: tuple[int, ...] = (1, 2)
    token_ms: float = 50.0
    tokens: int = 1200
    flood: int = 2000
    leak_jobs: int = 10_000
    outages: int = 3
    keep: Path | None = None
    """Where the evidence of each trial stays; ``python -m bench.chaos_stalls`` reads it."""


@dataclass
class Run:
    """A fleet with two workers that streams while something is done to it."""

    fleet: Fleet
    trial: Trial
    scale: Scale
    chance: random.Random
    faults_t: list[float] = field(default_factory=list)
    indices: dict[int, int] = field(default_factory=dict)

    def start(self, *, wait: bool = True) -> Worker:
        worker = self.fleet.start_worker(wait=False, salted=True, token_ms=self.scale.token_ms)
        self.indices[worker.pid] = len(self.fleet.workers) - 1
        if wait:
            self.wait_ready(worker)
        return worker

    def wait_ready(self, worker: Worker) -> None:
        self.fleet.wait_ready(worker, self.indices[worker.pid])

    def fault(self, what: str, pid: int = 0, *, cuts: bool = True) -> None:
        self.trial.fault(what, pid, cuts=cuts)
        self.faults_t.append(time.monotonic())

    def busiest(self) -> Worker:
        alive = [worker for worker in self.fleet.workers if worker.process.poll() is None]
        return max(alive, key=lambda worker: len(running(worker)))

    def pause(self, low_s: float, high_s: float) -> None:
        time.sleep(self.chance.uniform(low_s, high_s))


@contextmanager
def streaming(scale: Scale, seed: int) -> Iterator[Run]:
    """All streams running on two workers."""
    with (
        running_server() as server,
        folder_of(scale, seed) as folder,
        streaming_on(RedisServer(server, new_fleet_name()), folder, scale, seed) as run,
    ):
        yield run


@contextmanager
def folder_of(scale: Scale, seed: int) -> Iterator[Path]:
    if scale.keep is None:
        with tempfile.TemporaryDirectory(prefix="tf-chaos-") as folder:
            yield Path(folder)
    else:
        scale.keep.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix=f"{time.strftime('%H%M%S')}-seed{seed}-", dir=scale.keep))


@contextmanager
def streaming_on(server: Any, folder: Path, scale: Scale, seed: int) -> Iterator[Run]:
    fleet = Fleet(server, folder)
    try:
        with Trial(fleet) as trial:
            run = Run(fleet, trial, scale, random.Random(seed))
            workers = [run.start(wait=False) for _ in range(2)]
            for worker in workers:
                run.wait_ready(worker)
            trial.watch(trial.submit_many(scale.streams, max_new_tokens=scale.tokens))
            trial.until_streaming(5)
            yield run
    finally:
        fleet.close()


def judged(run: Run, name: str, seed: int, chances: int, **options: Any) -> Row:
    """Wait for the ends, have the checker judge, and sum up."""
    try:
        verdict = run.trial.judge(timeout_s=600, may_have=(), **options)
        violations, notes = 0, ""
    except AssertionError as error:
        verdict, violations, notes = Verdict(), max(1, str(error).count("\n")), str(error)[:300]
        print(notes, file=sys.stderr)
    readings = run.trial.readings
    takeovers = [pair for reading in readings for pair in reading.takeovers]
    recoveries = []
    for t, later in zip(run.faults_t, [*run.faults_t[1:], float("inf")], strict=True):
        again = [after - t for before, after in takeovers if before <= t + 0.5 and t <= after < later + 5]
        if again:
            recoveries.append(max(again))
    first, last = (run.faults_t[0], run.faults_t[-1]) if run.faults_t else (0.0, 0.0)
    gaps = [
        (a, b - a) for r in readings for a, b in zip(r.delta_times, r.delta_times[1:], strict=False)
    ]  # fmt: skip
    return Row(
        name=name,
        chances=chances,
        streams=len(readings),
        failed=sum(1 for r in readings if r.error is not None or type(r.events[-1]).__name__ != "Finished"),
        violations=violations,
        stalls_s=[after - before for before, after in takeovers],
        recoveries_s=recoveries,
        before_ms=[1000 * gap for t, gap in gaps if t < first - 0.2],
        after_ms=[1000 * gap for t, gap in gaps if t > last + 6],
        tokens=verdict.tokens,
        notes=notes,
    )


def until_all_go_on(run: Run) -> float:
    back = time.monotonic()
    counts = [reading.tokens for reading in run.trial.readings]
    watched = list(zip(run.trial.readings, counts, strict=True))
    wait_until(lambda: all(r.tokens > n or r.future.done() for r, n in watched), 60, "all go on")
    return time.monotonic() - back
