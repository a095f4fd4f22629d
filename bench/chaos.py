"""The long run of kills and outages: ``python -m bench.chaos``; ``--write`` puts the figures into docs/reliability.md.

Real processes (Valkey, Celery workers with the salted scripted engine), real signals; every client's history, a dump of
Redis and the engines' own records go to tests/faults/checker, which shares no code with the product. By default a
moderate run (some ten minutes on two cores); ``--full``: 200 streams x 20 kills x 3 seeds, and 50,000 jobs for leaks.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis

from bench.chaos_failover import crash_points, wait_cost
from bench.chaos_leaks import leak_run
from bench.chaos_report import Row, keep, kept, percentile, write_table
from tests.faults.checker import Verdict
from tests.faults.trial import Trial, ends, running
from tests.fleets import Fleet, Worker, wait_until
from tests.sentinels import replicated
from tests.servers import RedisServer, new_fleet_name, running_server

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"


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
        tempfile.TemporaryDirectory(prefix="tf-chaos-") as folder,
        streaming_on(RedisServer(server, new_fleet_name()), Path(folder), scale, seed) as run,
    ):
        yield run


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


# -- trials -----------------------------------------------------------------------------------------------------------


def kills(scale: Scale, seed: int) -> Row:
    """SIGKILL of the busier worker, main process or whole group by turns; a new one takes its place."""
    with streaming(scale, seed) as run:
        for number in range(scale.kills):
            victim = run.busiest()
            run.fault("SIGKILL", victim.pid)
            (victim.kill_group if number % 2 else victim.kill_main)(signal.SIGKILL)
            run.start()
            run.pause(0.5, 2.0)
        return judged(run, "`kill -9` of a worker", seed, scale.streams * scale.kills)


def lease_kills(scale: Scale, seed: int) -> Row:
    """The guardian dies with its worker: only the lease tells."""
    with streaming(scale, seed) as run:
        for _ in range(scale.outages):
            victim = run.busiest()
            guardians = [p for p in psutil.process_iter(["cmdline"]) if _guards(p, victim.pid)]
            run.fault("SIGKILL with guardian", victim.pid)
            for guardian in guardians:
                guardian.kill()
            victim.kill_group()
            run.start()
            run.pause(0.5, 2.0)
        return judged(run, "`kill -9` of a worker and its guardian", seed, scale.streams * scale.outages)


def _guards(process: psutil.Process, pid: int) -> bool:
    return "tokenfleet.workers.guardian" in " ".join(process.info["cmdline"] or ()) and process.ppid() == pid


def zombies(scale: Scale, seed: int) -> Row:
    """Frozen beyond its lease, then back."""
    freed_s = []
    with streaming(scale, seed) as run:
        for _ in range(scale.outages):
            victim = run.busiest()
            run.fault("SIGSTOP", victim.pid)
            victim.kill_group(signal.SIGSTOP)
            run.pause(5.0, 6.0)
            victim.kill_group(signal.SIGCONT)
            back = time.monotonic()
            wait_until(lambda victim=victim: not running(victim), 10, "the zombie's slots are free")
            freed_s.append(max(0.0, *(t - back for t in ends(victim).values())))
            run.pause(1.0, 2.0)
        row = judged(run, "a worker frozen for 5 s, then back", seed, scale.streams * scale.outages)
        row.notes = row.notes or f"all its slots free {', '.join(f'{s:.2f}' for s in freed_s)} s after it woke"
        return row


def rolling(scale: Scale, seed: int) -> Row:
    """SIGTERM twice (no grace) to every worker in turn, a new one before each."""
    with streaming(scale, seed) as run:
        for _ in range(max(2, scale.outages)):
            old = next(worker for worker in run.fleet.workers if worker.process.poll() is None)
            run.start()
            run.fault("SIGTERM", old.pid)
            old.kill_main(signal.SIGTERM)
            wait_until(lambda old=old: "Warm shutdown" in old.log, 10, "the first signal has been seen")
            old.kill_main(signal.SIGTERM)
            old.wait(30)
            run.pause(0.5, 1.0)
        return judged(run, "rolling restart", seed, scale.streams * max(2, scale.outages))


def redis_restarts(scale: Scale, seed: int) -> Row:
    """SIGKILL of Redis, and a new one over its append-only file."""
    with streaming(scale, seed) as run:
        went_on = []
        for _ in range(scale.outages):
            run.fault("redis SIGKILL", cuts=False)
            run.fleet.redis.kill9()
            run.fleet.redis.restart()
            went_on.append(_until_all_go_on(run))
            run.pause(1.0, 2.0)
        row = judged(run, "Redis killed and restarted with AOF", seed, scale.streams * scale.outages)
        row.recoveries_s = went_on
        return row


def redis_away(scale: Scale, seed: int) -> Row:
    """Down for 10 s."""
    with streaming(scale, seed) as run:
        run.fault("redis away", cuts=False)
        run.fleet.redis.kill9()
        time.sleep(10)
        run.fleet.redis.restart()
        went_on = _until_all_go_on(run)
        row = judged(run, "Redis down for 10 s", seed, scale.streams)
        row.recoveries_s = [went_on]
        row.notes = row.notes or _attempts(run)
        return row


def _until_all_go_on(run: Run) -> float:
    back = time.monotonic()
    counts = [reading.tokens for reading in run.trial.readings]
    watched = list(zip(run.trial.readings, counts, strict=True))
    wait_until(lambda: all(r.tokens > n or r.future.done() for r, n in watched), 60, "all go on")
    return time.monotonic() - back


def _attempts(run: Run) -> str:
    client: redis.Redis = run.fleet.redis.client(decode_responses=True)
    prefix = f"tokenfleet:{run.fleet.redis.fleet}:job:"
    epochs = [client.hmget(prefix + r.job.id, "epoch", "strikes") for r in run.trial.readings]
    return f"{sum(int(e) > 1 for e, _ in epochs)} takeovers, {sum(int(s) for _, s in epochs)} strikes"  # type: ignore[union-attr]


def redis_empty(scale: Scale, seed: int) -> Row:
    """Restarted without its data: every reader is told, and the fleet serves again."""
    with streaming(scale, seed) as run:
        run.fault("lose all", cuts=False)
        run.fleet.redis.kill9()
        run.fleet.redis.restart(empty=True)
        back = time.monotonic()
        run.trial.until_over(30)
        told_s = time.monotonic() - back

        def serves() -> bool:
            try:
                return bool(run.trial.submit("count", max_new_tokens=5, model="scripted").result(20))
            except Exception:
                return False

        wait_until(serves, 30, "it serves again")
        row = judged(run, "Redis restarted empty", seed, scale.streams)
        row.recoveries_s = [told_s]
        row.notes = row.notes or "recovery: until all readers had `lost_state`"
        return row


def cancels(scale: Scale, seed: int) -> Row:
    """One after the other, while all stream: how long until the engine's slot is free?"""
    with streaming(scale, seed) as run:
        freed_s = []
        for reading in run.trial.readings:
            began = time.monotonic()
            reading.job.cancel()
            job = reading.job.id
            t = wait_until(lambda job=job: _ended_t(run, job), 10, "a free slot")
            freed_s.append(t - began)
        run.fault("cancels", cuts=False)
        row = judged(run, "cancel of running jobs", seed, scale.streams)
        row.recoveries_s = freed_s
        row.failed = sum(type(r.events[-1]).__name__ != "Cancelled" for r in run.trial.readings)
        row.notes = row.notes or (
            f"slot free: p50 {percentile(freed_s, 50):.3f} s, p99 {percentile(freed_s, 99):.3f} s; success: cancelled"
        )
        return row


def _ended_t(run: Run, job_id: str) -> float:
    """When the job's sequence left its engine, by the engine's own record; 0 while it has not."""
    return max(
        (t for w in run.fleet.workers for sequence, t in ends(w).items() if sequence.startswith(job_id)), default=0
    )


def flood(scale: Scale, seed: int) -> Row:
    """More jobs than the queue takes, as fast as one client can; with a kill in the middle."""
    small = Scale(streams=1, token_ms=5.0, tokens=600)
    with streaming(small, seed) as run:
        run.trial.until_over(30)
        client = run.fleet.client(max_queued=1000)
        refused = 0
        taken = []
        run.trial.client, usual = client, run.trial.client
        started = time.monotonic()
        for number in range(scale.flood):
            try:
                taken.append(run.trial.submit("count", max_new_tokens=3))
            except Exception as error:
                refused += getattr(error, "code", "") == "queue_full"
            if number == scale.flood // 2:
                run.fault("SIGKILL", cuts=False)
                run.busiest().kill_group()
                run.start(wait=False)
        took_s = time.monotonic() - started
        run.trial.client = usual
        run.trial.watch(taken)
        row = judged(run, f"flood of {scale.flood:,} jobs, one kill", seed, scale.flood)
        row.notes = row.notes or f"{len(taken)} taken, {refused} refused in {took_s:.0f} s"
        return row


def failover(scale: Scale, seed: int, replicas: int = 0) -> Row:
    """SIGKILL of the master; real sentinels make a replica the master."""
    options = {"replicas": 2, "min_replicas_to_write": "1"} if replicas else {"replicas": 1}
    with replicated(new_fleet_name(), **options) as cluster, tempfile.TemporaryDirectory(prefix="tf-chaos-") as folder:
        cluster.replicas = replicas
        with streaming_on(cluster, Path(folder), scale, seed) as run:
            run.fault("failover", cuts=False)
            cluster.kill_master()
            went_on = _until_all_go_on(run)
            name = "Sentinel failover, `replicas=1`" if replicas else "Sentinel failover, replication not waited for"
            row = judged(run, name, seed, scale.streams)
            row.recoveries_s = [went_on]
            lost = sum(reading.error is not None for reading in run.trial.readings)
            row.notes = row.notes or f"{lost} `lost_state`; down-after 1 s"
            return row


def failover_wait(scale: Scale, seed: int) -> Row:
    """The same, with a replica waited for."""
    return failover(scale, seed, replicas=1)


TRIALS: dict[str, Callable[[Scale, int], Row]] = {
    f.__name__: f
    for f in (
        kills,
        lease_kills,
        zombies,
        rolling,
        redis_restarts,
        redis_away,
        redis_empty,
        failover,
        failover_wait,
        cancels,
        flood,
    )
}
TEXTS: dict[str, Callable[[Scale], str]] = {
    "wait_cost": lambda scale: wait_cost(),
    "crash_points": lambda scale: crash_points(),
    "leaks": lambda scale: leak_run(scale.leak_jobs),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", choices=[*TRIALS, *TEXTS, []], help="all unless named")
    parser.add_argument("--full", action="store_true", help="200 streams x 20 kills x 3 seeds, 50,000 jobs for leaks")
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--seed", type=int, action="append", help="these seeds only")
    parser.add_argument("--results", type=Path, help="keep rows in this file, and write all that it has")
    parser.add_argument("--render", action="store_true", help="run nothing: only write what --results has")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    args = parser.parse_args()
    scale = Scale()
    if args.full:
        scale = Scale(streams=200, kills=20, seeds=(1, 2, 3), token_ms=100.0, tokens=1500, flood=10_000,
                      leak_jobs=50_000, outages=5)  # fmt: skip
    elif args.quick:
        scale = Scale(streams=16, kills=3, seeds=(1,), flood=500, leak_jobs=2000, outages=1, tokens=500)
    wanted = [] if args.render else args.trials or [*TRIALS, *TEXTS]
    size = " --full" if args.full else " --quick" if args.quick else ""
    seeds = tuple(args.seed) if args.seed else scale.seeds
    rows, texts = kept(args.results) if args.results else ([], [])
    violations = 0
    for name in wanted:
        if name in TEXTS:
            texts.append(TEXTS[name](scale))
            print(texts[-1], flush=True)
            if args.results:
                keep(args.results, texts[-1])
            continue
        for seed in seeds:
            started = time.monotonic()
            row = TRIALS[name](scale, seed)
            row.command = f"python -m bench.chaos {name}{size}"
            rows.append(row)
            violations += row.violations
            if args.results:
                keep(args.results, row)
            print(f"{row.line()}  (seed {seed}, {time.monotonic() - started:.0f} s)", flush=True)
    stalls = [s for row in rows for s in row.stalls_s]
    if stalls:
        print(f"all stalls: n {len(stalls)}, p50 {statistics.median(stalls):.2f} s, p99 {percentile(stalls, 99):.2f} s")
    if args.write or args.render:
        machine = f"{time.strftime('%Y-%m-%d', time.gmtime())}, {psutil.cpu_count()} shared cores, "
        write_table(DOCUMENT, rows, texts, machine + f"Python {platform.python_version()}")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
