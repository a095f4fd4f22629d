"""Workers that are told to leave: running jobs finish within a grace period, then go to others, without a strike."""

from __future__ import annotations

import signal

from tests.faults.trial import Trial, ledger_of, running
from tests.fleets import Fleet, wait_until


def test_jobs_finish_within_the_grace_period(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=20.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(8, max_new_tokens=300)
        trial.watch(jobs)
        trial.until_streaming(10)
        trial.fault("SIGTERM", worker.pid, cuts=False)
        worker.kill_main(signal.SIGTERM)
        trial.judge()
        assert worker.wait(60) == 0
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"1"}


def test_after_the_grace_period_jobs_are_handed_over_at_once(fleet: Fleet) -> None:
    first = fleet.start_worker(salted=True, token_ms=60.0, env={"TOKENFLEET_GRACE_S": "0.5"})
    with Trial(fleet) as trial:
        jobs = trial.submit_many(8, max_new_tokens=900)
        trial.watch(jobs)
        trial.until_streaming(10)
        second = fleet.start_worker(salted=True, token_ms=3.0)
        trial.fault("SIGTERM", first.pid)
        first.kill_main(signal.SIGTERM)
        wait_until(lambda: len(running(second)) == 8, 15, "the spare worker has all jobs")
        assert first.wait(60) == 0
        verdict = trial.judge()
        assert verdict.cut_streams == 8
        assert not any("deaths" in ledger_of(fleet, job) for job in jobs), "it counted as a death"
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"2"}
        assert max(verdict.stalls_s) < trial.limit(5.0)


def test_a_second_signal_hands_over_immediately(fleet: Fleet) -> None:
    """Whatever that signal is: twice SIGTERM, or Celery's cold shutdown. Nothing is cancelled, nothing fails."""
    first, second = (fleet.start_worker(salted=True, token_ms=30.0, wait=False) for _ in range(2))
    for index, worker in enumerate((first, second)):
        fleet.wait_ready(worker, index)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(16, max_new_tokens=1500)
        trial.watch(jobs)
        trial.until_streaming(10)
        assert running(first), "nothing runs on the first worker"
        assert running(second), "nothing runs on the second worker"
        third = fleet.start_worker(salted=True, token_ms=1.0, wait=False)
        trial.fault("SIGTERM twice", first.pid)
        first.kill_main(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in first.log, 10, "the first signal has been seen")
        first.kill_main(signal.SIGTERM)
        assert first.wait(60) == 0
        trial.fault("SIGQUIT", second.pid)
        second.kill_main(signal.SIGQUIT)
        second.wait(60)
        fleet.wait_ready(third, 2)
        verdict = trial.judge()
        assert verdict.cut_streams == 16
        assert not any("deaths" in ledger_of(fleet, job) for job in jobs), "it counted as a death"


def test_a_rolling_restart_of_every_worker_fails_nothing(fleet: Fleet) -> None:
    grace = {"TOKENFLEET_GRACE_S": "0.2"}
    workers = [fleet.start_worker(salted=True, token_ms=40.0, env=grace, wait=False) for _ in range(2)]
    for index, worker in enumerate(workers):
        fleet.wait_ready(worker, index)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(12, max_new_tokens=1500)
        trial.watch(jobs)
        trial.until_streaming(10)
        for worker in workers:
            trial.fault("SIGTERM", worker.pid)
            fresh = fleet.start_worker(salted=True, token_ms=2.0, env=grace)
            worker.kill_main(signal.SIGTERM)
            assert worker.wait(60) == 0
            jobs += trial.submit_many(4, max_new_tokens=50)
            trial.watch(jobs[-4:])
        verdict = trial.judge()
        assert verdict.cut_streams >= 4
        assert {ledger_of(fleet, job)["state"] for job in jobs} == {"finished"}
        assert not any("deaths" in ledger_of(fleet, job) for job in jobs), "it counted as a death"
        assert fresh.process.poll() is None
