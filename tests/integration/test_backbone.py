"""A job's whole life on a real Redis, a real Celery worker and the scripted engine."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
from celery import Celery

from tests.fleets import Fleet, wait_until
from tokenfleet import Client, Job
from tokenfleet.wire.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    UnknownJob,
    UnknownModel,
)
from tokenfleet.wire.events import Cancelled, ChoiceFinished, Delta, Finished, Queued, Started
from tokenfleet.wire.keys import new_id


@pytest.fixture
def client(served: Fleet) -> Client:
    return served.client()


def ids_of(events: list[object]) -> list[int]:
    return [i for event in events if isinstance(event, Delta) for i in event.ids]


def test_a_job_streams_its_tokens_and_ends_once(client: Client) -> None:
    job = client.submit("count", max_new_tokens=40)
    with job.stream() as stream:
        events = list(stream)
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Started)
    assert isinstance(events[-2], ChoiceFinished)
    assert isinstance(events[-1], Finished)
    assert len(ids_of(events)) == 40 == events[-1].usage.completion_tokens
    assert stream.cursor == len(events)
    result = job.result(30)
    assert result.text == "".join(e.text for e in events if isinstance(e, Delta))
    assert result.choices[0].finish_reason == "length"
    assert list(result.choices[0].ids) == ids_of(events)


def test_late_and_repeated_readers_get_everything_and_cursors_resume(client: Client, served: Fleet) -> None:
    job = client.submit("count", max_new_tokens=60)
    with job.stream() as stream:
        head = list(islice(stream, 10))
        cursor = stream.cursor
    rest = list(job.stream(after=cursor))
    elsewhere = Job.from_id(job.id, served.client())
    everything = list(elsewhere.stream())
    assert ids_of(head + rest) == ids_of(everything)
    assert len(ids_of(everything)) == 60


def test_many_jobs_share_the_worker(client: Client) -> None:
    jobs = client.submit_many([f"question {i}" for i in range(64)], max_new_tokens=30)
    results = [job.result(60) for job in jobs]
    assert all(len(r.choices[0].ids) == 30 for r in results)
    assert len({r.text for r in results}) > 32


def test_status_tells_the_timeline(client: Client) -> None:
    job = client.submit("count", max_new_tokens=10, tags={"who": "me"}, priority="batch")
    job.result(20)
    status = job.status()
    assert status.state == "finished"
    assert status.attempts == 1
    assert status.tags == {"who": "me"}
    assert status.submitted_ms <= status.first_claimed_ms <= status.first_token_ms <= status.ended_ms


def test_a_running_job_is_cancelled_and_its_slot_is_free(client: Client, served: Fleet) -> None:
    job = client.submit("count", max_new_tokens=5000)
    with job.stream() as stream:
        list(islice(stream, 10))
        assert job.cancel("enough") == "cancelled"
        assert isinstance(list(stream)[-1], Cancelled)
    with pytest.raises(JobCancelled):
        job.result(30)
    wait_until(
        lambda: any(line["event"] == "end" and line["reason"] == "abort" for line in served.workers[0].record), 5
    )
    assert job.cancel() == "cancelled"


def test_the_same_id_with_the_same_body_is_the_same_job(client: Client) -> None:
    job_id = new_id()
    assert client.submit("count", max_new_tokens=5, job_id=job_id).id == job_id
    assert client.submit("count", max_new_tokens=5, job_id=job_id).id == job_id
    with pytest.raises(JobConflict):
        client.submit("count", max_new_tokens=6, job_id=job_id)


def test_bad_requests_are_refused_at_the_producer(client: Client) -> None:
    for bad in (
        {"temperature": float("nan")},
        {"temperature": -1},
        {"temperatur": 1.0},
        {"max_new_tokens": 0},
        {"stop": [""]},
        {"priority": "urgent"},
    ):
        with pytest.raises(InvalidRequest):
            client.submit("count", **bad)
    with pytest.raises(InvalidRequest):
        client.submit([])
    with pytest.raises(InvalidRequest):
        client.submit([{"role": "judge", "content": "x"}])
    with pytest.raises(UnknownModel):
        client.submit("count", model="no such model")
    with pytest.raises(UnknownJob):
        client.job(new_id()).result(30)
    with pytest.raises(UnknownJob):
        client.job("*").status()


def test_an_over_long_prompt_fails_before_prefill_with_the_counts(client: Client) -> None:
    job = client.submit("word " * 40_000, max_new_tokens=10)
    with pytest.raises(ContextLengthExceeded) as caught:
        job.result(30)
    assert caught.value.details["prompt_tokens"] > caught.value.details["context_tokens"]
    assert job.status().state == "failed"


def test_celerys_async_result_works(client: Client, served: Fleet) -> None:
    app = Celery(broker=served.redis.celery_url, backend=served.redis.celery_url)
    job = client.submit("count", max_new_tokens=12)
    value = app.AsyncResult(job.id).get(timeout=20)
    assert value["choices"][0]["text"] == job.result(30).text


def test_a_delayed_job_waits(client: Client) -> None:
    job = client.submit("count", max_new_tokens=5, countdown=1.5)
    job.result(20)
    status = job.status()
    assert status.first_claimed_ms - status.submitted_ms >= 1400


def test_many_threads_may_use_one_client(client: Client) -> None:
    texts: list[str] = []

    def ask() -> None:
        texts.append("".join(client.submit("same", max_new_tokens=20, do_sample=False).text()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == 8
    assert len(set(texts)) == 1


def test_closing_a_client_ends_other_threads_calls_and_leaves_no_socket(served: Fleet) -> None:
    client = served.client()
    jobs = client.submit_many(["count"] * 8, max_new_tokens=2000)
    said: list[object] = []

    def wait(job: Job) -> None:
        try:
            said.append(job.result())
        except RuntimeError as error:
            said.append(str(error))

    threads = [threading.Thread(target=wait, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    wait_until(lambda: jobs[-1].status().state == "running", 20, "the last one runs")
    pool = client.aio.ledger.client.connection_pool
    client.close()
    for thread in threads:
        thread.join(20)
    assert said == ["This client was closed by another thread."] * 8
    assert not [c for c in (*pool._available_connections, *pool._in_use_connections) if c.is_connected]
    with pytest.raises(RuntimeError, match="closed"):
        client.models()
    with served.client() as another:
        for job in jobs:
            another.job(job.id).cancel()
