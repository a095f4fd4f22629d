"""Engines that die, hang, block or fail one request; and processes of a worker killed one by one."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet, wait_until
from tests.processes import Standstill, is_alive, on_this_machine
from tokenfleet.wire.errors import EngineError


def test_a_dead_engine_sends_its_jobs_elsewhere_and_ends_its_worker(fleet: Fleet) -> None:
    first = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(6, max_new_tokens=600, stops_at=500)
        trial.watch(jobs)
        trial.until_streaming(10)
        trial.fault("engine dies")
        trap = trial.submit("[[fault: dead at 100 on attempt 1]]", max_new_tokens=200)
        trial.watch(trap)
        fleet.start_worker(salted=True, token_ms=3.0, wait=False)
        assert first.wait(60) != 0, "a supervisor would not start it again"
        verdict = trial.judge()
        assert verdict.cut_streams == 7
        assert {ledger_of(fleet, job)["state"] for job in [*jobs, trap]} == {"finished"}
        assert {ledger_of(fleet, job)["strikes"] for job in [*jobs, trap]} == {"0"}, "all had made progress"


def test_an_engine_that_dies_while_nothing_runs_is_noticed(fleet: Fleet) -> None:
    first = fleet.start_worker()
    job = fleet.client().submit("[[fault: doom 1 at 1]]", max_new_tokens=3)
    job.result(20)
    ended, stalls = time.monotonic(), Standstill()
    assert first.wait(60) != 0, "a supervisor would not start it again"
    assert time.monotonic() - ended - stalls.end() < on_this_machine(8), (
        "1 s until it dies, 2 s to notice, the rest to leave"
    )
    assert ledger_of(fleet, job)["strikes"] == "0"


def test_a_hung_engine_loses_its_lease_by_decision(fleet: Fleet) -> None:
    first = fleet.start_worker(salted=True, token_ms=10.0, env={"TOKENFLEET_HANG_S": "3.5"})
    with Trial(fleet) as trial:
        jobs = trial.submit_many(4, max_new_tokens=700, stops_at=600)
        trial.watch(jobs)
        trial.until_streaming(10)
        trial.fault("engine hangs")
        trap = trial.submit("[[fault: freeze at 100 on attempt 1]]", max_new_tokens=400)
        trial.watch(trap)
        fleet.start_worker(salted=True, token_ms=3.0, wait=False)
        assert first.wait(60) != 0, "a supervisor would not start it again"
        verdict = trial.judge()
        assert verdict.cut_streams == 5


def test_a_loop_blocked_for_8_s_costs_no_takeover(fleet: Fleet) -> None:
    """A long prefill does the same: the lease's thread goes on."""
    fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(4, max_new_tokens=800)
        trial.watch(jobs)
        trial.until_streaming(5)
        trial.fault("blocked loop", cuts=False)
        started = time.monotonic()
        trap = trial.submit("[[fault: block 8 at 30]]", max_new_tokens=200)
        trial.watch(trap)
        wait_until(lambda: ledger_of(fleet, trap)["state"] == "running", 10, "it is claimed")
        fleet.start_worker(salted=True, token_ms=10.0, wait=False)
        trial.judge()
        assert time.monotonic() - started > 6, "nothing was blocked: nothing is proven"
        assert {ledger_of(fleet, job)["epoch"] for job in [trap, *jobs]} == {"1"}


def test_one_request_that_fails_fails_alone(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=5.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(6, max_new_tokens=300)
        broken = [trial.submit(f"[[fault: {kind} at {at}]]", max_new_tokens=50)
                  for kind in ("raise", "oom") for at in (0, 20)]  # fmt: skip
        trial.watch([*jobs, *broken])
        trial.fault("failing requests", cuts=False)
        trial.judge()
        for job in broken:
            with pytest.raises(EngineError):
                job.result(30)
        assert {ledger_of(fleet, job)["state"] for job in jobs} == {"finished"}
        assert worker.process.poll() is None


def test_every_other_process_of_a_worker_may_be_killed(fleet: Fleet) -> None:
    """Its guardian and whatever children it has: one by one, and at last the worker without its guardian."""
    first = fleet.start_worker(salted=True, token_ms=40.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(4, max_new_tokens=1200)
        trial.watch(jobs)
        trial.until_streaming(10)
        children = [child.pid for child in first.children()]
        guardians = [
            p.pid for p in psutil.process_iter(["pid", "cmdline"])
            if "tokenfleet.workers.guardian" in " ".join(p.info["cmdline"] or ()) and p.ppid() == first.pid
        ]  # fmt: skip
        assert guardians, "the worker has no guardian"
        for pid in {*children, *guardians}:
            trial.fault("SIGKILL of a child", pid, cuts=False)
            psutil.Process(pid).send_signal(signal.SIGKILL)
        tokens = [reading.tokens for reading in trial.readings]
        wait_until(lambda: all(r.tokens > n for r, n in zip(trial.readings, tokens, strict=True)), 10, "it goes on")
        second = fleet.start_worker(salted=True, token_ms=3.0)
        # Without a guardian (killed again just before) the lease has to do.
        for process in psutil.process_iter(["pid", "cmdline"]):
            if "tokenfleet.workers.guardian" in " ".join(process.info["cmdline"] or ()) and process.ppid() == first.pid:
                process.send_signal(signal.SIGKILL)
        trial.kill(first)
        verdict = trial.judge()
        assert verdict.cut_streams == 4
        assert second.process.poll() is None


def test_ten_seconds_later_nothing_of_a_dead_worker_is_left(fleet: Fleet) -> None:
    first = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        trial.watch(trial.submit_many(2, max_new_tokens=500, stops_at=400))
        trial.until_streaming(10)
        pids = [first.pid, *(child.pid for child in first.children())]
        fleet.start_worker(salted=True, token_ms=3.0, wait=False)
        trial.kill(first, whole_group=False)
        first.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 10, "all its processes are gone")
        trial.judge()
