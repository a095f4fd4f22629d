"""tokenfleet in a Celery user's own canvas: chain, chord, link and link_error, revoke; and what Flower may see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.fleets import MODEL, ROOT, Fleet, wait_until
from tests.processes import on_this_machine
from tests.servers import RedisServer
from tokenfleet import Job, chat
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.workers.links import send_links
from tokenfleet.workers.publisher import celery_success


@pytest.fixture(scope="module")
def users(served: Fleet) -> Iterator[Any]:
    """The user's app, with a worker of his own."""
    env = {**os.environ, "USERS_URL": served.redis.celery_url}
    from tests.integration import celery_users_app

    command = [sys.executable, str(ROOT / "tests" / "die_with_parent.py")]
    reader, writer = os.pipe()
    command += [str(reader), sys.executable, "-m", "celery", "-A", "tests.integration.celery_users_app", "worker"]
    command += ["-P", "threads", "-c", "2", "-l", "warning", "-n", "users@%h"]
    worker = subprocess.Popen(command, env=env, cwd=ROOT, pass_fds=[reader], start_new_session=True)
    os.close(reader)
    celery_users_app.app.conf.update(broker_url=env["USERS_URL"], result_backend=env["USERS_URL"])
    yield celery_users_app
    worker.kill()
    worker.wait()
    os.close(writer)


def sig(fleet: Fleet, *messages: Any, **named: Any) -> Any:
    return chat.s(*messages, model=MODEL, fleet=fleet.redis.fleet, **{"max_new_tokens": 8, **named})


def test_a_chain_goes_through_the_fleet(users: Any, served: Fleet) -> None:
    result = chain(users.ask.s("rivers"), sig(served), users.keep.s(), app=users.app).apply_async()
    kept = result.get(timeout=30)
    job = served.client().job(result.parent.id)
    assert kept == {"kept": job.result(30).text, "n": 1}


def test_a_chord_waits_for_all_chats(users: Any, served: Fleet) -> None:
    header = group([sig(served, f"question {i}") for i in range(4)])
    texts = chord(header, users.keep_all.s(), app=users.app).apply_async().get(timeout=30)
    assert len(texts) == 4
    assert all(texts)


def test_a_part_of_a_chord_that_could_not_be_counted_is_counted_later(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis was away between the job's end and the count: the chord would never have been complete."""
    app = Celery("users", broker=shared_redis.celery_url, backend=shared_redis.celery_url)
    keys, job_id, group_id = Keys(shared_redis.fleet), new_id(), new_id()
    chord_of = {"group": group_id, "group_index": 0, "chord": app.signature("users.keep_all", queue=f"q{group_id}")}
    outbox = keys.prefix + "outbox"

    def away(*_: Any, **__: Any) -> None:
        raise RedisConnectionError

    with shared_redis.client() as redis:
        redis.hset(keys.job(job_id), "links", json.dumps(chord_of))
        redis.set(f"celery-task-meta-{job_id}", celery_success(job_id, {}))
        redis.sadd(outbox, job_id)
        app.backend.set_chord_size(group_id, 1)
        with monkeypatch.context() as outage:
            outage.setattr(app.backend, "on_chord_part_return", away)
            with pytest.raises(RedisConnectionError):
                send_links(app, redis, keys, job_id)
        assert redis.sismember(outbox, job_id)
        send_links(app, redis, keys, job_id)
        send_links(app, redis, keys, job_id)  # by another worker, at the same time
        assert redis.llen(f"q{group_id}") == 1
        assert not redis.sismember(outbox, job_id)


def test_links_are_sent_once_at_the_end(users: Any, served: Fleet) -> None:
    ok = sig(served, "hello", app=users.app).apply_async(link=users.count.s("linked"))
    assert ok.get(timeout=30)["choices"]
    client = served.redis.client()
    wait_until(lambda: client.get("users:linked") == b"1", 15)
    served.client().job(ok.id).cancel()
    time.sleep(2.5)  # two more reaps
    assert client.get("users:linked") == b"1"


def test_link_error_follows_a_cancelled_job_and_bad_arguments(users: Any, served: Fleet) -> None:
    client = served.redis.client()
    running = sig(served, "hello", max_new_tokens=5000, app=users.app).apply_async(
        link_error=users.failed.s("cancelled")
    )
    job = served.client().job(running.id)
    wait_until(lambda: client.exists(f"tokenfleet:{served.redis.fleet}:job:{running.id}"), 10)
    wait_until(lambda: job.status().completion_tokens > 5, 10)
    job.cancel("enough")
    with pytest.raises(TaskRevokedError):
        running.get(timeout=30)
    wait_until(lambda: client.lrange("users:cancelled", 0, -1) == [running.id.encode()], 15)
    bad = sig(served, "hello", temperature=-1, app=users.app).apply_async(link_error=users.failed.s("bad"))
    with pytest.raises(InvalidRequest):
        bad.get(timeout=30)
    wait_until(lambda: client.lrange("users:bad", 0, -1) == [bad.id.encode()], 15)


@pytest.mark.parametrize("terminate", [False, True])
def test_revoke_is_cancel(served: Fleet, terminate: bool) -> None:
    app = Celery(broker=served.redis.celery_url, backend=served.redis.celery_url)
    job = served.client().submit("hello", max_new_tokens=5000)
    wait_until(lambda: job.status().completion_tokens > 5, 10)
    app.control.revoke(job.id, terminate=terminate)
    wait_until(lambda: job.status().state == "cancelled", 10)


def test_expires_is_the_queues_time_to_live(served: Fleet) -> None:
    """Past when its message comes: it never becomes a job. Else the job waits no longer than that."""
    app = Celery(broker=served.redis.celery_url, backend=served.redis.celery_url)
    with served.redis.client() as client:
        late = sig(served, "late", app=app).apply_async(expires=-5)
        with pytest.raises(TaskRevokedError):
            late.get(timeout=30)
        assert not client.exists(f"tokenfleet:{served.redis.fleet}:job:{late.id}")
        waits = sig(served, "waits", app=app, countdown=100).apply_async(expires=160)
        key = f"tokenfleet:{served.redis.fleet}:job:{waits.id}"
        wait_until(lambda: client.exists(key), 10)
        assert 40 < json.loads(client.hget(key, "options"))["queue_ttl_s"] <= 60, "from when it is due"
        due_ms = client.zscore(f"tokenfleet:{served.redis.fleet}:deadlines", waits.id)
        assert due_ms - int(client.hget(key, "submitted_ms")) <= 160_000
    served.client().job(waits.id).cancel()
    with pytest.raises(TaskRevokedError):
        waits.get(timeout=30)


def test_nobody_sees_a_prompt_through_celery(served: Fleet) -> None:
    """Neither events (Flower) nor ``inspect`` nor the worker's log show what a job says."""
    app = Celery(broker=served.redis.celery_url, backend=served.redis.celery_url)
    secret = "xyzzy-plugh"
    seen: list[dict[str, Any]] = []
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})
        consumer = receiver.itercapture(limit=None, timeout=20, wakeup=True)
        next(consumer, None)
        raw = Celery(broker=served.redis.celery_url, backend=served.redis.celery_url)
        queue = sig(served).options["queue"]

        def send(said: str) -> Job:
            sent = raw.send_task("tokenfleet.chat", args=(said,), kwargs={"max_new_tokens": 30}, queue=queue)
            wait_until(lambda: served.redis.client().exists(f"tokenfleet:{served.redis.fleet}:job:{sent.id}"), 20)
            return served.client().job(sent.id)

        job = send(f"{secret} [[fault: hang at 20]]")  # it runs until it is cancelled
        active = wait_until(
            lambda: [t for w in (app.control.inspect(timeout=2.0, limit=2).active() or {}).values() for t in w], 20
        )
        job.cancel()
        last = send(secret)
        last.result(20)
        until = time.monotonic() + on_this_machine(20)
        while time.monotonic() < until and not any(
            e["type"] == "task-succeeded" and e["uuid"] == last.id for e in seen
        ):
            next(consumer, None)
    assert {job.id, last.id} <= {e["uuid"] for e in seen if e["type"] == "task-received"}
    assert any(e["type"] == "task-succeeded" and e["uuid"] == last.id for e in seen)
    assert secret not in repr(active)
    assert secret not in repr([e for e in seen if e["type"] != "task-sent"])
    assert secret not in served.workers[0].log
