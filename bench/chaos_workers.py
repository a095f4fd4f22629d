"""Trials of workers: killed, frozen, restarted one by one; and cancels of what they run."""

from __future__ import annotations

import signal
import time

import psutil

from bench.chaos_report import Row, percentile
from bench.chaos_run import Run, Scale, judged, streaming
from tests.faults.trial import ends, running
from tests.fleets import wait_until


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
