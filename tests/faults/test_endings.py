"""Cancels and deadlines, also against a job's own end and with no worker left: one end, always."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from celery import Celery

from tests.faults.trial import Reading, Trial, aborted, ledger_of, running, stopping
from tests.fleets import ROOT, Fleet, wait_until
from tests.processes import on_this_machine
from tokenfleet.wire.errors import JobCancelled, JobExpired
from tokenfleet.wire.keys import Keys

WRONG_CLOCK = Path(__file__).with_name("wrong_clock")


def served_by(worker: object) -> set[str]:
    return {line["sequence_id"][:36] for line in worker.record if line["event"] == "prefill"}  # type: ignore[attr-defined]


def test_cancel_against_finish_gives_one_end(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=60.0)
    chance = random.Random(11)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(150, max_new_tokens=40)
        readings = trial.watch(jobs)
        trial.fault("cancels", cuts=False)

        async def cancel(reading: Reading) -> str:
            """After so many deltas, or at the end if there are fewer: on any machine some are early and some late."""
            wanted = chance.randrange(80)
            while len(reading.delta_times) < wanted and not reading.future.done():
                await asyncio.sleep(0.005)
            return await trial.client.aio.job(reading.job.id).cancel("raced")

        async def cancel_all() -> list[str]:
            return await asyncio.gather(*(cancel(reading) for reading in readings))

        said = trial.client.thread.run(cancel_all())
        trial.judge()
        assert [ledger_of(fleet, job)["state"] for job in jobs] == said
        print(f"{said.count('cancelled')} cancelled, {said.count('finished')} finished")
        assert set(said) == {"cancelled", "finished"}, "no race: nothing is proven"
        wait_until(lambda: not running(worker), 5, "all slots are free")


def test_a_cancelled_job_frees_its_slot_at_once(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(20, max_new_tokens=3000)
        trial.watch(jobs)
        trial.until_streaming(5)
        trial.fault("cancels", cuts=False)
        waits = []
        for job in jobs:
            before, started = aborted(worker), time.monotonic()
            job.cancel()
            wait_until(lambda before=before: aborted(worker) > before, 10, "a free slot")
            waits.append(time.monotonic() - started)
        print(f"slot free after {sorted(waits)[10]:.3f} s (median), {max(waits):.3f} s (longest of 20)")
        trial.judge()


def test_a_job_cancelled_or_expired_in_the_queue_never_runs(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True)
    worker.kill_group()
    with Trial(fleet) as trial:
        cancelled, revoked, expired, run = (
            trial.submit("count", max_new_tokens=10, queue_ttl_s=1.0 if k == 2 else 600) for k in range(4)
        )
        trial.watch([cancelled, revoked, expired, run])
        trial.fault("cancels", cuts=False)
        assert cancelled.cancel() == "cancelled"
        # With no worker left, whoever watches the job ends it.
        wait_until(lambda: ledger_of(fleet, expired)["state"] == "expired", 10, "the queue's time-to-live")
        worker = fleet.start_worker(salted=True, wait=False, env={"TOKENFLEET_SLOTS": "1"})
        wait_until(lambda: ledger_of(fleet, run)["state"] == "finished", 30, "the last job")
        trial.judge()
        assert served_by(worker) == {run.id, revoked.id}
        with pytest.raises(JobCancelled):
            cancelled.result(30)
        with pytest.raises(JobExpired):
            expired.result(30)


def test_celery_revoke_means_cancel(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=10.0, env={"TOKENFLEET_SLOTS": "1"})
    keys = Keys(fleet.redis.fleet)
    app = Celery(broker=fleet.redis.celery_url, backend=fleet.redis.celery_url)
    app.conf.broker_transport_options = {"priority_steps": [0, 3, 6], "queue_order_strategy": "priority"}
    app.conf.task_default_queue = keys.queue("scripted")
    with Trial(fleet) as trial:
        runs, waits = (trial.submit("count", max_new_tokens=3000) for _ in range(2))
        trial.watch([runs, waits])
        trial.until_streaming(5, trial.readings[:1])
        trial.fault("revoke", cuts=False)
        app.control.revoke(waits.id)
        app.control.revoke(runs.id, terminate=True)
        trial.judge(timeout_s=30)
        assert ledger_of(fleet, runs)["state"] == "cancelled"
        assert ledger_of(fleet, waits)["state"] == "cancelled"
        wait_until(lambda: not running(worker), 5, "a free slot")
        assert served_by(worker) == {runs.id}
    app.close()


def test_a_total_deadline_ends_a_running_job_and_one_whose_worker_is_dead(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=20.0)
    with Trial(fleet) as trial:
        trial.fault("deadline", cuts=False)
        short = trial.submit("count", max_new_tokens=3000, deadline_s=2.0)
        trial.watch(short)
        wait_until(lambda: ledger_of(fleet, short)["state"] == "expired", 10, "the deadline")
        wait_until(lambda: aborted(worker) == 1, 5, "its slot is free")
        orphan = trial.submit("count", max_new_tokens=3000, deadline_s=6.0)
        trial.until_streaming(5, trial.watch(orphan))
        worker.kill_group()
        assert ledger_of(fleet, orphan)["state"] != "expired", "a live worker may have ended it: nothing is proven"
        trial.judge(timeout_s=20)
        entry = ledger_of(fleet, orphan)
        assert entry["state"] == "expired"
        late_ms = int(entry["ended_ms"]) - int(entry["deadline_ms"])
        print(f"ended {late_ms} ms after its deadline, with no worker left")
        assert late_ms >= 0


@pytest.mark.parametrize("off_s", [-7200, 7200])
def test_a_workers_wrong_clock_is_nobodys_business(fleet: Fleet, off_s: int) -> None:
    """Deadlines and leases are in Redis' time: nothing ends early, nothing late, nothing is taken over."""
    wrong = {"PYTHONPATH": f"{WRONG_CLOCK}:{ROOT}", "WRONG_CLOCK_S": str(off_s)}
    worker = fleet.start_worker(salted=True, token_ms=10.0, env=wrong)
    code = "import time, sys; print(time.time())"
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ, **wrong}, capture_output=True, text=True)
    assert abs(float(told.stdout) - time.time() - off_s) < 60, "the clock is right: nothing is proven"
    with Trial(fleet) as trial:
        plain = trial.submit("count", max_new_tokens=800, queue_ttl_s=30, deadline_s=60)
        short = trial.submit("count", max_new_tokens=3000, deadline_s=3.0)
        trial.watch(short)
        trial.until_streaming(5, trial.watch(plain))
        trial.fault("deadline", cuts=False)
        trial.judge()
        assert ledger_of(fleet, plain)["state"] == "finished"
        entry = ledger_of(fleet, short)
        assert entry["state"] == "expired"
        assert 0 <= int(entry["ended_ms"]) - int(entry["deadline_ms"]) < on_this_machine(10_000)
        assert {ledger_of(fleet, job)["epoch"] for job in (plain, short)} == {"1"}
        assert worker.process.poll() is None


def test_a_reader_that_leaves_cancels_if_the_job_says_so(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=10.0)
    client = fleet.client()
    stays = client.submit("count", max_new_tokens=300)
    goes = client.submit(stopping(300), max_new_tokens=400, cancel_on_disconnect=True)
    for job in (stays, goes):
        with job.stream() as stream:
            list(islice(stream, 5))
    wait_until(lambda: ledger_of(fleet, goes)["state"] == "cancelled", 5, "cancelled")
    wait_until(lambda: aborted(worker) == 1, 5, "its slot is free")
    assert len(stays.result(30).choices[0].ids) == 300
