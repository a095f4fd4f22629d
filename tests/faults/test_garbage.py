"""Whatever stands in queues, logs and channels that is no message of ours: dropped or a typed error; nobody dies."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet, wait_until
from tokenfleet.wire.errors import LostState, TokenfleetError, UnknownJob
from tokenfleet.wire.events import Failed
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.scripts import run_blocking

GARBAGE = [
    b"",
    b"\x00\xff\xfe",
    b"not json",
    b"[]",
    b"{}",
    b"null",
    b"17",
    b'{"body": 5, "headers": [], "properties": null}',
]


def envelope(body: object, **headers: object) -> bytes:
    """A Celery message with anything in it."""
    head = {"lang": "py", "task": "tokenfleet.run", "id": new_id(), "argsrepr": "", "ignore_result": True, **headers}
    properties = {
        "correlation_id": new_id(), "reply_to": "", "delivery_mode": 2, "priority": 0, "delivery_tag": new_id(),
        "delivery_info": {"exchange": "", "routing_key": "q"},
    }  # fmt: skip
    return json.dumps(
        {
            "body": body if isinstance(body, str) else json.dumps(body), "content-encoding": "utf-8",
            "content-type": "application/json", "headers": head, "properties": properties,
        }
    ).encode()  # fmt: skip


def test_garbage_in_the_queue_is_dropped(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        queue = Keys(fleet.redis.fleet).queue("scripted")
        jobs = trial.submit_many(4, max_new_tokens=1000)
        trial.watch(jobs)
        trial.until_streaming(5)
        trial.fault("garbage", cuts=False)
        strange = [
            envelope("no json"), envelope([]), envelope([["../../etc/passwd"], {}, {}]), envelope([[5], {}, {}]),
            envelope([[new_id()], {}, {}]), envelope([["a" * 100_000], {}, {}]), envelope([[jobs[0].id], {}, {}]),
            envelope([["*"], {}, {}]), envelope([[new_id(), 2, 3], {"x": 1}, {}]),
            envelope([[], {}, {}], task="os.system"), envelope([[], {}, {}], id="not an id"),
            envelope([[], {}, {}], task=None), envelope([[], {}, {}], retries="x"),
        ]  # fmt: skip
        for message in [*GARBAGE, *strange]:
            client.lpush(queue, message)
        jobs.append(trial.submit("count", max_new_tokens=10))
        trial.watch(jobs[-1:])
        trial.judge()
        assert worker.process.poll() is None
        wait_until(lambda: client.llen(queue) == 0, 20, "all garbage is taken out")
        assert len(trial.client.submit("count", max_new_tokens=5).result(20).choices[0].ids) == 5
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"1"}, "a second message ran a job twice"


def test_garbage_on_channels_is_dropped(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True)
    keys = Keys(fleet.redis.fleet)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        jobs = trial.submit_many(2, max_new_tokens=1000)
        trial.watch(jobs)
        trial.until_streaming(5)
        trial.fault("garbage", cuts=False)
        worker_id = trial.client.workers()[0]["id"]
        lies = [
            b'{"seq":-5,"events":[]}',
            b'{"seq":1e99,"events":[]}',
            b'{"seq":2,"events":[{"type":"none"}]}',
            b'{"seq":2}',
        ]
        for message in [*GARBAGE, *lies, b"cancel", b"cancel \xff", b"fence", b"cancel " + new_id().encode()]:
            client.publish(keys.live(jobs[0].id), message)
            client.publish(keys.control(worker_id), message)
        trial.judge()
        assert worker.process.poll() is None
        assert dict(client.pubsub_numsub(keys.control(worker_id))) == {keys.control(worker_id).encode(): 1}
        # A job that writes nothing learns from that channel that it was cancelled.
        job = trial.client.submit("[[fault: hang at 10]]", max_new_tokens=5000)
        with job.stream() as stream:
            list(islice(stream, 4))
            job.cancel()
        wait_until(lambda: any(x["event"] == "end" and x["reason"] == "abort" for x in worker.record), 5, "a free slot")


@pytest.mark.parametrize(
    "garbage", [b"garbage", b'{"type":"none"}', b'{"type":"delta"}'], ids=["text", "type", "fields"]
)
def test_garbage_in_a_log_ends_that_job_alone(fleet: Fleet, garbage: bytes) -> None:
    worker = fleet.start_worker(salted=True)
    keys = Keys(fleet.redis.fleet)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        other = trial.submit("count", max_new_tokens=400)
        trial.watch(other)
        broken = trial.client.submit("count", max_new_tokens=3000)
        with broken.stream() as stream:
            list(islice(stream, 5))
            trial.fault("garbage", cuts=False)
            client.xadd(keys.log(broken.id), {"e": garbage})  # its id is a time: all later ones are smaller
            wait_until(lambda: ledger_of(fleet, broken)["state"] == "failed", 10, "the broken job has ended")
            try:
                last = list(stream)[-1]
            except LostState:
                pass  # it met the garbage itself
            else:
                assert isinstance(last, Failed)
                assert last.error.code == "lost_state"
        trial.until_over(30)
        assert trial.readings[0].error is None
        assert trial.readings[0].tokens == 400
        assert worker.process.poll() is None


def test_garbage_in_the_ledger_fails_that_job_alone(fleet: Fleet) -> None:
    """A job body that fails validation on the worker, as another release's might."""
    keys = Keys(fleet.redis.fleet)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        worker = fleet.start_worker()
        broken = []
        with worker.frozen():
            for field, value in [
                ("request", b"\xff"),
                ("request", b"{}"),
                ("options", b"[]"),
                ("request", b'{"kind":"chat","x":1}'),
            ]:
                job = trial.client.submit("count", max_new_tokens=10)
                client.hset(keys.job(job.id), field, value)
                broken.append(job)
            good = trial.submit("count", max_new_tokens=10)
            trial.watch(good)
            trial.fault("garbage", cuts=False)
        for job in broken:
            with pytest.raises(TokenfleetError):
                job.result(30)
        trial.until_over(30)
        assert worker.process.poll() is None


def test_unknown_ids_are_unknown_jobs(fleet: Fleet) -> None:
    fleet.start_worker()
    client = fleet.client()
    for bad in ("", "*", "../x", "a" * 5000, new_id(), "tokenfleet:x:meta", new_id() + "\n"):
        with pytest.raises(UnknownJob):
            client.job(bad).status()
        with pytest.raises(UnknownJob):
            client.job(bad).cancel()
        with pytest.raises(UnknownJob):
            client.job(bad).result(30)


def test_a_claim_that_nobody_runs_is_given_back(fleet: Fleet) -> None:
    """A claim may reach Redis after its worker gave up on it."""
    fleet.start_worker(salted=True)
    keys = Keys(fleet.redis.fleet)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        job = trial.submit("count", max_new_tokens=20, countdown=3600)
        trial.watch(job)
        trial.fault("stray claim", cuts=False)
        worker_id = trial.client.workers()[0]["id"]
        assert run_blocking(client, "claim", keys.prefix, job.id, worker_id, new_id(), "claim")[0] == b"claimed"
        verdict = trial.judge()
        assert verdict.tokens == 20
        assert ledger_of(fleet, job)["strikes"] == "0"
