"""A job that kills whoever runs it ends as a dead letter; its neighbours don't."""

from __future__ import annotations

import json
import time

import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet, Worker, wait_until
from tokenfleet import Job
from tokenfleet.cli import main
from tokenfleet.wire.errors import JobFailed


def keep_one_alive(fleet: Fleet, until_ended: Job, most: int = 8, **engine_args: object) -> list[Worker]:
    """What a supervisor does: start a worker whenever there is none, until the job has ended."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if ledger_of(fleet, until_ended)["state"] not in ("queued", "running"):
            return fleet.workers
        if all(worker.process.poll() is not None for worker in fleet.workers):
            assert len(fleet.workers) < most, "it goes on killing workers"
            fleet.start_worker(wait=False, **engine_args)
        time.sleep(0.05)
    pytest.fail("the poison job has not ended")


def test_only_the_poison_among_64_neighbours_is_given_up(fleet: Fleet) -> None:
    """Nobody has a first token when it strikes, so that every death is a strike for all of them."""
    slow_start = {"ttft_ms": 150.0, "token_ms": 5.0, "salted": True}
    fleet.start_worker(**slow_start)
    with Trial(fleet) as trial:
        poison = trial.submit("[[fault: die at 0]]", max_new_tokens=20)
        jobs = trial.submit_many(64, max_new_tokens=20)
        trial.watch([poison, *jobs])
        trial.fault("poison", cuts=False)
        workers = keep_one_alive(fleet, poison, **slow_start)
        assert sum(worker.process.poll() is not None for worker in workers) == 3
        if all(worker.process.poll() is not None for worker in workers):
            fleet.start_worker(**slow_start)
        trial.judge(timeout_s=120)
        entry = ledger_of(fleet, poison)
        assert (entry["state"], entry["strikes"]) == ("failed", "3")
        with pytest.raises(JobFailed) as caught:
            poison.result(30)
        assert caught.value.code == "poison"
        assert entry["deaths"].count("died in attempt") == 3
        assert entry["request"], "the dead letter keeps its payload"
        assert [len(job.result(20).choices[0].ids) for job in jobs] == [20] * 64
        client = fleet.redis.client(decode_responses=True)
        prefix = f"tokenfleet:{fleet.redis.fleet}:"
        assert client.zrange(f"{prefix}dead", 0, -1) == [poison.id]
        assert 6 * 86400 < client.ttl(f"{prefix}job:{poison.id}") <= 7 * 86400


def test_a_job_that_kills_at_a_certain_token_keeps_what_it_delivered(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """New tokens reset the strikes; then the token that kills is the first of every attempt."""
    fleet.start_worker(salted=True)
    with Trial(fleet) as trial:
        job = trial.submit("[[fault: die at 30]]", max_new_tokens=60)
        [reading] = trial.watch(job)
        trial.fault("poison", cuts=False)
        workers = keep_one_alive(fleet, job, salted=True)
        trial.judge()
        assert sum(worker.process.poll() is not None for worker in workers) >= 3
        assert ledger_of(fleet, job)["strikes"] == "3"
        assert 10 <= reading.tokens <= 30
    monkeypatch.setenv("TOKENFLEET_REDIS_URL", fleet.redis.url)
    monkeypatch.setenv("TOKENFLEET_FLEET", fleet.redis.fleet)
    capsys.readouterr()

    def dead(*words: str, status: int = 0) -> str:
        assert main(["dead", *words]) == status
        return capsys.readouterr().out

    [letter] = map(json.loads, dead("list", "--json").splitlines())
    assert (letter["job_id"], letter["code"], letter["strikes"]) == (job.id, "poison", 3)
    assert letter["request"]["messages"][0]["content"] == "[[fault: die at 30]]"
    assert len(letter["deaths"]) >= 3
    assert job.id in dead("list")
    shown = dead("show", job.id)
    assert "[[fault: die at 30]]" in shown
    assert shown.count("died in attempt") == len(letter["deaths"])
    again = dead("requeue", job.id).strip()
    assert dead("requeue", job.id).strip() == again, "twice makes one job"
    retry = fleet.client().job(again)
    assert retry.id != job.id
    assert dead("list") == "", "it has been seen to"
    assert dead("show", again, status=2) == "", "the new job has not failed"
    assert json.loads(ledger_of(fleet, retry)["options"])["retry_of"] == job.id
    assert retry.cancel() == "cancelled"


def test_an_engine_that_dies_under_a_job_is_a_strike_too(fleet: Fleet) -> None:
    """Not the worker's death, but its engine's: a job that kills engines must not go round for ever."""
    fleet.start_worker(salted=True)
    with Trial(fleet) as trial:
        job = trial.submit("[[fault: dead at 0]]", max_new_tokens=60)
        trial.watch(job)
        trial.fault("poison", cuts=False)
        keep_one_alive(fleet, job, salted=True)
        trial.judge()
        assert ledger_of(fleet, job)["strikes"] == "3"
        assert len(fleet.workers) <= 4


def test_the_fleet_serves_on_after_a_poison_job(fleet: Fleet) -> None:
    """One worker with a spare: each takes its blow, and whoever is started next serves."""
    fleet.start_worker()
    with Trial(fleet) as trial:
        job = trial.submit("[[fault: exit at 0 on attempt 1]]", max_new_tokens=20)
        trial.watch(job)
        trial.fault("exit", cuts=False)
        wait_until(lambda: fleet.workers[0].process.poll() is not None, 20, "the worker's death")
        fleet.start_worker(wait=False)
        trial.judge(may_run_plain=True)
        assert ledger_of(fleet, job)["strikes"] in ("0", "1")
        assert job.status().attempts == 2
