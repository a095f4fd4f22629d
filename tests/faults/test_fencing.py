"""A worker that was frozen or cut off and comes back: it writes nothing visible, and frees its engine's slots."""

from __future__ import annotations

import signal
import time

from tests.faults.proxy import proxied
from tests.faults.trial import Trial, aborted, ends, ledger_of, running, stopping
from tests.fleets import Fleet, Worker, wait_until


def freed_within(trial: Trial, zombie: Worker, woken: float, limit_s: float = 4.0) -> None:
    """By the engine's own record. The aim is a second; a busy machine gets more."""
    wait_until(lambda: not running(zombie), 10, "the zombie's slots are free")
    took_s = max(ends(zombie).values()) - woken
    print(f"its slots were free {took_s:.2f} s after it woke")
    assert took_s < trial.limit(limit_s)


def begun(worker: Worker) -> set[str]:
    """The jobs that this worker's engine has had."""
    return {line["sequence_id"][:36] for line in worker.record if line["event"] == "prefill"}


def test_a_frozen_worker_that_comes_back_is_fenced(fleet: Fleet) -> None:
    first = fleet.start_worker(salted=True, token_ms=60.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(6, max_new_tokens=900)
        trial.watch(jobs)
        trial.until_streaming(10)
        second = fleet.start_worker(salted=True, token_ms=3.0)
        trial.fault("SIGSTOP", first.pid)
        first.kill_group(signal.SIGSTOP)
        wait_until(lambda: len(running(second)) == 6, 20, "the second worker has all jobs")
        first.kill_group(signal.SIGCONT)
        freed_within(trial, first, time.monotonic())
        verdict = trial.judge()
        assert verdict.cut_streams == 6
        assert aborted(first) == 6
        assert {ledger_of(fleet, job)["strikes"] for job in jobs} == {"0"}, "it had made progress"
        # It is a worker like any other again.
        assert len(trial.client.submit("count", max_new_tokens=5).result(20).choices[0].ids) == 5
        wait_until(lambda: len(trial.client.workers()) == 2, 10, "both are registered")


def test_a_zombie_whose_jobs_are_long_gone_frees_its_slots(fleet: Fleet) -> None:
    """Retention is over and the keys have expired when it wakes."""
    first = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        job = trial.submit(stopping(500), max_new_tokens=600, retention_s=0.5)
        trial.watch(job)
        trial.until_streaming(20)
        trial.fault("SIGSTOP", first.pid, cuts=False)
        first.kill_group(signal.SIGSTOP)
        fleet.start_worker(salted=True, token_ms=2.0)
        trial.until_over(60)
        wait_until(lambda: not ledger_of(fleet, job), 20, "the job's keys are gone")
        first.kill_group(signal.SIGCONT)
        freed_within(trial, first, time.monotonic())
        assert not ledger_of(fleet, job), "the zombie brought a dead job back"
        assert trial.readings[0].tokens == 600


def test_a_worker_cut_off_from_redis_is_fenced_when_it_is_back(fleet: Fleet) -> None:
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        first = fleet.start_worker(
            salted=True, token_ms=20.0, wait=False, env={"TOKENFLEET_REDIS_URL": proxy.url}
        )  # fmt: skip
        # Slower than the first: what that one has to say when it is back would come next, were it let.
        second = fleet.start_worker(salted=True, token_ms=30.0, wait=False)
        for index, worker in enumerate((first, second)):
            fleet.wait_ready(worker, index)
        trial.watch(trial.submit_many(8, max_new_tokens=600))
        trial.until_streaming(10)
        held = {name[:36] for name in running(first)}
        assert held, "nothing runs on the worker that is cut off"
        trial.fault("partition")
        with proxy.partition():
            wait_until(lambda: held <= begun(second), 20, "the second worker has all jobs")
        # All that it wrote meanwhile arrives now.
        wait_until(lambda: not running(first), 15, "the zombie's slots are free")
        verdict = trial.judge(in_flight_tokens=500)
        assert verdict.cut_streams == len(held)


def test_lost_replies_and_short_cuts_are_no_fence(fleet: Fleet) -> None:
    """The connection breaks after Redis did what it was asked: every call is made again, and nothing is doubled."""
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        worker = fleet.start_worker(salted=True, token_ms=5.0, env={"TOKENFLEET_REDIS_URL": proxy.url})
        jobs = trial.submit_many(8, max_new_tokens=1500)
        trial.watch(jobs)
        trial.until_streaming(10)
        [first, *_] = trial.readings
        rounds = 0
        while rounds < 8 and first.tokens < 1300:
            rounds += 1
            trial.fault("lost reply", cuts=False)
            tokens = first.tokens
            before = proxy.lost_replies
            proxy.lose_replies(2)
            wait_until(lambda before=before: proxy.lost_replies > before, 10, "a reply is lost")
            trial.fault("reset", cuts=False)
            proxy.cut()
            wait_until(lambda tokens=tokens: first.tokens > tokens, 10, "it goes on")
        verdict = trial.judge()
        assert rounds >= 3
        assert verdict.cut_streams == 0
        assert aborted(worker) == 0
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"1"}
