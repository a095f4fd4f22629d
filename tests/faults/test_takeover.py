"""First proofs: a stream survives the worker that was writing it, salted so that starting over would show."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import redis

from tests.faults.trial import Trial, ledger_of, running, stopping
from tests.fleets import Fleet, Worker
from tests.processes import Standstill, on_this_machine
from tokenfleet.engines.scripted import salt_of
from tokenfleet.wire.events import AnyEvent, Delta, Finished
from tokenfleet.wire.keys import Keys

TOKENS = 700


def ids_of(events: list[AnyEvent]) -> list[int]:
    return [i for event in events if isinstance(event, Delta) for i in event.ids]


def until(tokens: int, stream: Iterator[AnyEvent]) -> list[AnyEvent]:
    """Its events until so many tokens have come."""
    events: list[AnyEvent] = []
    while len(ids_of(events)) < tokens:
        events.append(next(stream))
    return events


def indices_of(events: list[AnyEvent]) -> list[int]:
    return [e.index + k for e in events if isinstance(e, Delta) for k in range(len(e.ids))]


@pytest.mark.parametrize("how", ["group", "main"])
def test_stream_survives_the_worker_that_was_writing_it(fleet: Fleet, how: str) -> None:
    workers = two_workers(fleet, salted=True, token_ms=10.0)
    client = fleet.client()
    job = client.submit(stopping(TOKENS - 100), max_new_tokens=TOKENS)
    with job.stream() as stream:
        head = until(40, stream)
        [first] = [worker for worker in workers if running(worker)]
        [second] = [worker for worker in workers if worker is not first]
        assert 10 <= len(ids_of(head)) <= TOKENS - 100, "not mid-stream: this run would prove nothing"
        (first.kill_group if how == "group" else first.kill_main)(signal.SIGKILL)
        killed_at, stalls = time.monotonic(), Standstill()
        cut = len(ids_of(head))
        tail, stall_s, last = [], 0.0, killed_at
        for event in stream:
            tail.append(event)
            stall_s, last = max(stall_s, time.monotonic() - last), time.monotonic()
    events = head + tail
    ids = ids_of(events)
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.attempts == 2
    assert indices_of(events) == list(range(TOKENS))
    assert ids_of(list(job.stream())) == ids, "a reader opened after the end sees the same"
    assert stall_s - stalls.end() < on_this_machine(5.0)
    # Tokens before the cut carry the first attempt's salt, those after it the second's.
    salts = [salt_of(i) for i in ids]
    assert len(set(salts[:cut])) == 1
    changes = [k for k in range(1, TOKENS) if salts[k] != salts[k - 1]]
    assert len(changes) == 1
    assert changes[0] >= cut
    made = sum(len(line["made"]) for w in (first, second) for line in w.record if line["event"] == "tokens")
    in_flight = 100  # at 10 ms a token, what a loaded machine may hold between engine and log
    assert made <= TOKENS + in_flight
    assert any(line["event"] == "prefill" and line["delivered_tokens"] == changes[0] for line in second.record)


def two_workers(fleet: Fleet, **options: Any) -> list[Worker]:
    """Both ready before any stream begins: none ends while a spare worker is loading."""
    workers = [fleet.start_worker(wait=False, **options) for _ in range(2)]
    for index, worker in enumerate(workers):
        fleet.wait_ready(worker, index)
    return workers


def test_a_stream_that_was_cut_goes_on_before_jobs_that_wait(fleet: Fleet) -> None:
    first = fleet.start_worker(token_ms=2.0, env={"TOKENFLEET_SLOTS": "1"})
    client = fleet.client()
    cut = client.submit(stopping(50), max_new_tokens=60)
    with cut.stream() as stream:
        until(20, stream)
        waiting = [client.submit("count", max_new_tokens=5) for _ in range(4)]
        first.kill_group(signal.SIGKILL)
        second = fleet.start_worker(token_ms=2.0, env={"TOKENFLEET_SLOTS": "1"})
        assert isinstance(list(stream)[-1], Finished)
    for job in waiting:
        job.result()
    order = [line["sequence_id"] for line in second.record if line["event"] == "prefill"]
    assert [each.startswith(cut.id) for each in order] == [True, False, False, False, False]


def test_a_shorter_lease_finds_a_lost_machine_sooner(fleet: Fleet) -> None:
    """The guardian dies with its worker, as when the machine is gone: only the lease tells."""
    lease = {"TOKENFLEET_LEASE": '{"heartbeat_s": 0.3, "lease_s": 1.0}'}
    first = fleet.start_worker(salted=True, token_ms=60.0, env=lease)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(4, max_new_tokens=1000)
        trial.watch(jobs)
        trial.until_streaming(5)
        fleet.start_worker(salted=True, token_ms=1.0, env=lease)
        guardian = guardian_of(first)
        trial.fault("SIGKILL with guardian", first.pid)
        guardian.kill()
        first.kill_group()
        verdict = trial.judge()
        assert verdict.cut_streams == 4
        assert min(verdict.stalls_s) > 0.3, "somebody told: it was not the lease"
        assert max(verdict.stalls_s) < trial.limit(5.0)
        assert {ledger_of(fleet, job)["strikes"] for job in jobs} == {"0"}


def test_a_guardian_that_came_too_late_still_buries_its_worker(fleet: Fleet) -> None:
    """Started by a worker that was killed before its guardian looked: all it has is what it was told."""
    lease = {"TOKENFLEET_LEASE": '{"lease_s": 60.0}'}  # the lease can't be what tells
    worker = fleet.start_worker(token_ms=10.0, env=lease)
    job = fleet.client().submit(stopping(TOKENS - 100), max_new_tokens=TOKENS)
    with job.stream() as stream:
        until(20, stream)
        owner = ledger_of(fleet, job)["worker"]
        guardian_of(worker).kill()
        worker.kill_group()
        worker.wait()
        told = f"{worker.pid}\n{fleet.redis.url}\n{fleet.redis.fleet}\n{owner}\n"
        subprocess.run([sys.executable, "-m", "tokenfleet.workers.guardian"], input=told.encode(), check=True)
        assert job.status().state == "queued"


def guardian_of(worker: Worker) -> psutil.Process:
    [found] = [
        p for p in psutil.process_iter(["cmdline"])
        if "tokenfleet.workers.guardian" in " ".join(p.info["cmdline"] or ()) and p.ppid() == worker.pid
    ]  # fmt: skip
    return found


def test_a_lost_celery_message_is_found(fleet: Fleet) -> None:
    """kombu pops a message, then records it: a worker that dies in between loses it. Here the test loses it."""
    client = fleet.client()
    first = fleet.start_worker()
    first.kill_group()
    first.wait()
    job = client.submit("count", max_new_tokens=20)
    server: redis.Redis = fleet.redis.client()
    lost = server.rpop(Keys(fleet.redis.fleet).queue("scripted"))
    assert job.id.encode() in lost, "the message was not there to be lost"
    fleet.start_worker()
    started = time.monotonic()
    assert len(job.result(30).choices[0].ids) == 20
    assert time.monotonic() - started < on_this_machine(15)
    assert job.status().attempts == 1
