"""More than the fleet can take: refused with a reason, or done; never twice. And a backlog is not a loss."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults.trial import Trial
from tests.fleets import Fleet, wait_until
from tokenfleet.wire.errors import Overloaded
from tokenfleet.wire.jobs import JobOptions, digest
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.scripts import _source, run_blocking


def test_a_full_queue_refuses_with_a_time_to_come_back(fleet: Fleet) -> None:
    fleet.start_worker(salted=True).kill_group()
    with Trial(fleet, client=fleet.client(max_queued=30)) as trial:
        jobs = trial.submit_many(30, max_new_tokens=5)
        trial.fault("full queue", cuts=False)
        for _ in range(5):
            with pytest.raises(Overloaded) as caught:
                trial.submit("count", max_new_tokens=5, job_id=new_id())
            assert caught.value.code == "queue_full"
            assert caught.value.retry_after_s > 0
            assert caught.value.http_status == 429
        trial.watch(jobs)
        fleet.start_worker(salted=True, wait=False)
        trial.judge()
        trial.submit("count", max_new_tokens=5).result(20)


def test_500_calls_at_once_share_the_connections(fleet: Fleet) -> None:
    """redis-py's own pool fails the 101st."""
    fleet.start_worker(salted=True, token_ms=1.0)
    client = fleet.client()

    async def ask(number: int) -> int:
        job = await client.aio.submit(f"question {number}", max_new_tokens=3)
        await job.status()
        return len((await job.result(60)).choices[0].ids)

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(ask(number) for number in range(500)))

    assert client.thread.run(all_at_once()) == [3] * 500
    assert fleet.redis.client().info("clients")["connected_clients"] < 150


def test_a_flood_leaves_every_job_done_or_refused_and_none_run_twice(fleet: Fleet) -> None:
    # Slower than any producer.
    fleet.start_worker(salted=True, token_ms=5.0, env={"TOKENFLEET_SLOTS": "2"})
    with Trial(fleet, client=fleet.client(max_queued=300)) as trial:
        trial.fault("flood", cuts=False)
        jobs, refused = [], 0
        started = time.monotonic()
        for _ in range(1500):
            try:
                jobs.append(trial.submit("count", max_new_tokens=3, job_id=new_id()))
            except Overloaded:
                refused += 1
        print(f"{len(jobs)} taken and {refused} refused in {time.monotonic() - started:.1f} s")
        trial.watch(jobs)
        verdict = trial.judge(timeout_s=120, in_flight_tokens=0)
        assert refused, "no overload: nothing is proven"
        assert verdict.tokens == 3 * len(jobs)


def test_a_backlog_of_10000_is_no_loss(fleet: Fleet) -> None:
    """No message is sent twice while a slow worker eats its way in."""
    fleet.start_worker(token_ms=5.0, env={"TOKENFLEET_SLOTS": "4"})
    keys = Keys(fleet.redis.fleet)
    with fleet.redis.client() as client:
        text, sha = _source("submit")
        client.execute_command("SCRIPT", "LOAD", text)
        request = b'{"kind":"chat","messages":[{"role":"user","content":"count"}],"params":{"max_new_tokens":20}}'
        mark = digest("scripted", request, JobOptions())
        pipe = client.pipeline(transaction=False)
        for number in range(10_000):
            lane = (0, 3, 6)[number % 3]
            fields = ["request", request, "retention_ms", 600_000]
            pipe.execute_command(
                "EVALSHA", sha, 0, keys.prefix, new_id(), mark, "scripted", keys.queue("scripted"), lane, 0, 3_600_000,
                86_400_000, 100_000, *fields,
            )  # fmt: skip
        assert all(reply[0] == b"accepted" for reply in pipe.execute())
        until = time.monotonic() + 10  # beyond the rule's 5 s, with claims in every second
        resent = 0
        while time.monotonic() < until:
            resent += run_blocking(client, "reap", keys.prefix)[3]
            time.sleep(0.25)
        done = 10_000 - client.zcard(keys.waiting("scripted"))
        print(f"{done} of 10,000 claimed; {resent} sent again")
        assert 50 < done < 9000, "not a backlog any more: nothing is proven"
        pipe = client.pipeline(transaction=False)
        for job in client.zrange(keys.waiting("scripted"), 0, -1):
            pipe.hget(keys.job(job.decode()), "sends")
        assert set(pipe.execute()) == {b"1"}, "messages were sent again under a mere backlog"


def test_lost_messages_of_a_backlog_are_found(fleet: Fleet) -> None:
    """kombu pops, then records: whatever dies in between takes a message with it. Here every tenth."""
    fleet.start_worker(salted=True).kill_group()
    keys = Keys(fleet.redis.fleet)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        jobs = trial.submit_many(100, max_new_tokens=5)
        queue = keys.queue("scripted")
        messages = client.lrange(queue, 0, -1)
        trial.fault("lost messages", cuts=False)
        for message in messages[::10]:
            assert client.lrem(queue, 1, message) == 1
        trial.watch(jobs)
        started = time.monotonic()
        fleet.start_worker(salted=True)
        up = time.monotonic()
        trial.judge(timeout_s=60)
        print(f"all found and done {time.monotonic() - up:.1f} s after the worker was up ({up - started:.1f} s)")
        wait_until(lambda: client.llen(queue) == 0, 10, "an empty queue")
