"""Readers that are slow, frozen, cut off, late or not told: each gets the whole text; the others don't notice."""

from __future__ import annotations

import asyncio
import random
import time

from tests.faults.proxy import proxied
from tests.faults.trial import Trial
from tests.fleets import Fleet, wait_until
from tests.processes import on_this_machine
from tokenfleet import Client


def test_slow_late_and_repeated_readers_get_everything(fleet: Fleet) -> None:
    fleet.start_worker(salted=True, token_ms=1.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(6, max_new_tokens=3000)
        quick = trial.watch(jobs, "quick")
        slow = trial.watch(jobs, "slow", pause_s=0.3)
        wait_until(lambda: all(reading.tokens >= 20 for reading in quick), 30, "20 tokens everywhere")
        trial.fault("slow readers", cuts=False)
        memory = [fleet.redis.client().info("memory")["used_memory"]]
        wait_until(lambda: all(reading.future.done() for reading in quick), 60, "quick readers are through")
        behind = [reading.tokens for reading in slow if not reading.future.done()]
        trial.until_over(60)
        for cursor in (0, 1, 7, 100, 10_000):
            trial.read_now(jobs[0], f"late-{cursor}", after=min(cursor, len(quick[0].events) - 1))
        memory.append(fleet.redis.client().info("memory")["used_memory"])
        trial.judge()
        print(f"{len(behind)} slow readers were behind when the quick ones were through; Redis: {memory} bytes")
        assert memory[1] - memory[0] < 16e6


def test_connections_killed_every_200_ms(fleet: Fleet) -> None:
    """All of them: readers', workers' and Celery's."""
    fleet.start_worker(salted=True, token_ms=5.0)
    with Trial(fleet) as trial, fleet.redis.client() as killer:
        jobs = trial.submit_many(8, max_new_tokens=1500)
        trial.watch(jobs)
        trial.until_streaming(5)
        rounds = 0
        while not all(reading.future.done() for reading in trial.readings):
            assert rounds < on_this_machine(150), "the streams don't end"
            trial.fault("killed connections", cuts=False)
            for kind in ("pubsub", "normal"):
                killer.client_kill_filter(_type=kind, skipme=True)
            rounds += 1
            time.sleep(0.2)
        verdict = trial.judge()
        print(f"{rounds} times all connections were killed")
        assert rounds > 10
        assert verdict.tokens == 12_000


def test_a_frozen_reader_is_cut_off_and_catches_up(fleet: Fleet) -> None:
    """Its channel overflows (pub/sub is a hint): Redis drops it, and it reads what it missed from the log."""
    fleet.start_worker(salted=True, token_ms=2.0)
    with fleet.redis.client() as client:
        client.config_set("client-output-buffer-limit", "pubsub 32768 16384 1")
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        frozen = Client(proxy.url, fleet=fleet.redis.fleet)
        fleet.clients.append(frozen)
        jobs = trial.submit_many(8, max_new_tokens=4000)
        quick = trial.watch(jobs, "quick")
        slow = trial.watch(jobs, "frozen", client=frozen)
        trial.until_streaming(10)
        trial.fault("frozen reader", cuts=False)
        with proxy.partition():
            wait_until(lambda: all(reading.future.done() for reading in quick), 60, "quick readers are through")
        verdict = trial.judge()
        assert fleet.redis.client().info("stats")["client_output_buffer_limit_disconnections"] >= 1
        assert [reading.text for reading in slow] == [reading.text for reading in quick]
        assert verdict.tokens == 32_000


def test_a_dropped_last_message_hangs_nobody(fleet: Fleet) -> None:
    fleet.start_worker(salted=True, token_ms=5.0)
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        proxy.drop_messages_with = b'"type":"finished"'
        deaf = Client(proxy.url, fleet=fleet.redis.fleet)
        fleet.clients.append(deaf)
        jobs = trial.submit_many(8, max_new_tokens=200)
        trial.watch(jobs, "deaf", client=deaf)
        trial.fault("dropped messages", cuts=False)
        trial.judge(timeout_s=20)
        assert proxy.dropped_messages >= 1, "no last message was dropped: nothing is proven"


def test_dropped_messages_are_read_from_the_log_at_once(fleet: Fleet) -> None:
    """In the middle of a stream: the next message shows the gap. Without that, all would wait for the job's end."""
    fleet.start_worker(salted=True, token_ms=20.0)
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        proxy.drop_messages_with = b'"index":4'  # 4, and 40 to 49
        deaf = Client(proxy.url, fleet=fleet.redis.fleet)
        fleet.clients.append(deaf)
        readings = trial.watch(trial.submit_many(4, max_new_tokens=500), "deaf", client=deaf)
        trial.fault("dropped messages", cuts=False)
        wait_until(lambda: all(r.tokens > 100 for r in readings), 20, "they are past the gaps")
        assert proxy.dropped_messages >= 4, "no message was dropped: nothing is proven"
        assert not any(r.future.done() for r in readings), "all waited for the end"
        trial.judge(timeout_s=20)


def test_readers_that_come_and_go_leave_nothing_behind(fleet: Fleet) -> None:
    worker = fleet.start_worker(salted=True, token_ms=10.0)
    chance = random.Random(1)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        jobs = trial.submit_many(4, max_new_tokens=600)
        trial.watch(jobs, "steady")
        trial.until_streaming(5)
        trial.fault("readers leave", cuts=False)

        async def come_and_go(number: int) -> None:
            job = trial.client.aio.job(chance.choice(jobs).id)
            async with job.stream(after=chance.randrange(5)) as stream:
                for _ in range(chance.randrange(1, 20)):
                    if await stream.next_batch() == []:
                        break

        async def all_of_them() -> None:
            await asyncio.gather(*(come_and_go(number) for number in range(60)))

        trial.client.thread.run(all_of_them())
        verdict = trial.judge()
        assert verdict.tokens == 2400
        wait_until(
            lambda: client.pubsub_channels(f"tokenfleet:{fleet.redis.fleet}:live:*") == [], 5, "no subscriptions"
        )
        assert worker.process.poll() is None
