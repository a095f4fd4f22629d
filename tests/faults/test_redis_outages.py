"""Redis goes away, comes back with its data, or without, or with less of it, or is full."""

from __future__ import annotations

import time

import pytest
import redis

from tests.faults.proxy import proxied
from tests.faults.trial import Trial, ledger_of, running
from tests.fleets import Fleet, Worker, wait_until
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet import Client
from tokenfleet.wire.errors import LostState, Overloaded
from tokenfleet.wire.keys import Keys


def both_ready(fleet: Fleet, **engine_args: object) -> None:
    for _ in range(2):
        fleet.start_worker(wait=False, **engine_args)
    for index, worker in enumerate(fleet.workers):
        fleet.wait_ready(worker, index)


def until_all_go_on(trial: Trial, tokens: list[int]) -> None:
    """Each reader has more than its ``tokens``, or all there is."""
    watched = list(zip(trial.readings, tokens, strict=True))
    wait_until(lambda: all(r.tokens > n or r.future.done() for r, n in watched), 20, "all go on")


def test_redis_killed_and_restarted_with_its_log_under_load(fleet: Fleet) -> None:
    both_ready(fleet, salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(24, max_new_tokens=1000)
        trial.watch(jobs)
        trial.until_streaming(20)
        trial.fault("redis SIGKILL", fleet.redis.pid, cuts=False)
        fleet.redis.kill9()
        fleet.redis.restart()
        tokens = [reading.tokens for reading in trial.readings]
        back = time.monotonic()
        until_all_go_on(trial, tokens)
        print(f"all streams went on {time.monotonic() - back:.2f} s after Redis was back")
        jobs += trial.submit_many(4, max_new_tokens=20)
        trial.watch(jobs[-4:])
        trial.judge(may_have=())
        assert {ledger_of(fleet, job)["state"] for job in jobs} == {"finished"}
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"1"}, "an outage of Redis is nobody's fault"


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_redis_away_for_ten_seconds_under_64_streams(fleet: Fleet, how: str) -> None:
    """0 takeovers, 0 strikes; what was generated meanwhile is delivered afterwards."""
    both_ready(fleet, salted=True, token_ms=20.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(64, max_new_tokens=620)
        trial.watch(jobs)
        trial.until_streaming(5)
        trial.fault(f"redis {how} for 10 s", fleet.redis.pid, cuts=False)
        away = time.monotonic()
        if how == "frozen":
            with fleet.redis.stop_cont():
                wait_until(lambda: time.monotonic() - away > 10, 20)
        else:
            fleet.redis.kill9()
            wait_until(lambda: time.monotonic() - away > 10, 20)
            fleet.redis.restart()
        back, tokens = time.monotonic(), [reading.tokens for reading in trial.readings]
        until_all_go_on(trial, tokens)
        print(f"all 64 streams went on {time.monotonic() - back:.2f} s after Redis was back")
        trial.judge(in_flight_tokens=0)
        assert {ledger_of(fleet, job)["epoch"] for job in jobs} == {"1"}, "a takeover"
        assert {ledger_of(fleet, job)["strikes"] for job in jobs} == {"0"}, "a strike"


def test_redis_restarted_empty(fleet: Fleet) -> None:
    """Clients are told `lost_state`, orphaned generations stop, and the fleet serves again by itself."""
    both_ready(fleet, salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        trial.watch(trial.submit_many(12, max_new_tokens=5000))
        trial.until_streaming(10)
        waiting = trial.submit("count", max_new_tokens=5, countdown=3600)
        [idle] = trial.watch(waiting, "waiting")
        wait_until(lambda: idle.events, 10, "the waiting job's first event")
        trial.fault("lose all", fleet.redis.pid, cuts=False)
        fleet.redis.kill9()
        fleet.redis.restart(empty=True)
        back = time.monotonic()
        trial.until_over(10)
        print(f"all readers were told {time.monotonic() - back:.2f} s after Redis was back, empty")
        assert all(isinstance(reading.error, LostState) for reading in trial.readings)
        wait_until(lambda: not any(running(worker) for worker in fleet.workers), 10, "orphaned generations stop")

        def serves() -> bool:
            try:
                return len(trial.submit("count", max_new_tokens=5, model="scripted").result(30).choices[0].ids) == 5
            except Exception:
                return False

        wait_until(serves, 20, "the fleet serves again")
        trial.judge()


def test_workers_wait_for_a_redis_that_comes_later(fleet: Fleet) -> None:
    url = fleet.redis.url
    fleet.redis.kill9()
    worker = fleet.start_worker(wait=False)
    wait_until(lambda: "redis" in worker.log.lower() or worker.process.poll() is not None, 20)
    fleet.redis.restart()
    assert fleet.redis.url == url
    fleet.wait_ready(worker, 0)
    assert len(fleet.client().submit("count", max_new_tokens=5).result(20).choices[0].ids) == 5


def test_a_log_cut_behind_a_reader_ends_with_lost_state(fleet: Fleet) -> None:
    """As after a power loss with appendfsync everysec: never other text for a delivered index."""
    fleet.start_worker(salted=True, token_ms=20.0)
    with Trial(fleet) as trial:
        job = trial.submit("count", max_new_tokens=3000)
        [reading] = trial.watch(job)
        trial.until_streaming(30)
        trial.fault("log cut", cuts=False)
        keys = Keys(fleet.redis.fleet)
        # What a file replayed up to an earlier second leaves.
        with fleet.redis.client() as client, client.pipeline(transaction=True) as pipe:
            pipe.delete(keys.log(job.id))
            for k in range(1, 6):
                pipe.xadd(keys.log(job.id), {"e": '{"type":"queued"}'}, id=f"{k}-0")
            pipe.hset(keys.job(job.id), mapping={"seq": 5, "tokens": 0})
            pipe.execute()
        trial.until_over(10)
        assert isinstance(reading.error, LostState)
        wait_until(lambda: ledger_of(fleet, job)["state"] == "failed", 10, "the job's end")
        wait_until(lambda: not running(fleet.workers[0]), 5, "its slot is free")
        with pytest.raises(LostState):
            job.result(30)


def test_power_loss_with_everysec_loses_a_second_and_says_so(fleet: Fleet) -> None:
    """Redis and the only worker die at once, and the end of the append-only file with them."""
    worker = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        jobs = trial.submit_many(8, max_new_tokens=3000)
        trial.watch(jobs)
        trial.until_streaming(60)
        trial.fault("power loss", cuts=False)
        lose_the_end(fleet, worker)
        fleet.start_worker(salted=True, token_ms=1.0)
        trial.until_over(60)
        assert all(isinstance(reading.error, LostState) for reading in trial.readings)
        for job in jobs:
            with pytest.raises(LostState):
                job.result(20)
        assert {ledger_of(fleet, job)["state"] for job in jobs} == {"failed"}


def test_a_reader_that_was_away_while_a_shorter_log_grew_again(fleet: Fleet) -> None:
    """Its cursor fits the log, which has other text there by now: it must not get it."""
    worker = fleet.start_worker(salted=True, token_ms=10.0)
    with proxied(fleet.redis) as proxy, Trial(fleet) as trial:
        away = Client(proxy.url, fleet=fleet.redis.fleet)
        fleet.clients.append(away)
        jobs = trial.submit_many(4, max_new_tokens=1000)
        readings = trial.watch(jobs, "away", client=away)
        trial.until_streaming(60)
        trial.fault("power loss", cuts=False)
        with proxy.refusal():
            lose_the_end(fleet, worker)
            fleet.start_worker(salted=True, token_ms=1.0)
            wait_until(lambda: all(ledger_of(fleet, job)["state"] == "finished" for job in jobs), 30, "all go on")
            read = [len(reading.events) for reading in readings]
            assert all(int(ledger_of(fleet, job)["seq"]) > n for job, n in zip(jobs, read, strict=True))
        trial.until_over(30)
        assert all(isinstance(reading.error, LostState) for reading in readings)
        assert [len(reading.events) for reading in readings] == read, "it was given what stands there now"


def lose_the_end(fleet: Fleet, worker: Worker) -> None:
    """Redis and the worker die at once, and the last third of the append-only file is not on the disk."""
    fleet.redis.kill9()
    worker.kill_group()
    worker.wait()
    [log] = (fleet.redis.server.data_folder / "appendonlydir").glob("*.incr.aof")
    size = log.stat().st_size
    with log.open("r+b") as file:
        file.truncate(size * 2 // 3)
    fleet.redis.restart()


def test_a_full_redis_refuses_new_jobs_and_finishes_running_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_server() as server:
        fleet = Fleet(RedisServer(server, new_fleet_name()), tmp_path_factory.mktemp("full"))
        try:
            fill_and_heal(fleet)
        finally:
            fleet.close()


def fill_and_heal(fleet: Fleet) -> None:
    both_ready(fleet, salted=True, token_ms=10.0)
    with Trial(fleet) as trial, fleet.redis.client() as client:
        jobs = trial.submit_many(16, max_new_tokens=900)
        trial.watch(jobs)
        trial.until_streaming(10)
        trial.fault("full", cuts=False)
        # Their messages are sent, and their worker's books written, while Redis is full.
        jobs += [trial.submit("count", max_new_tokens=20, countdown=4) for _ in range(4)]
        trial.watch(jobs[-4:])
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", used + 200_000)

        def fill(key: str) -> bool:
            try:
                client.append(key, b"x" * 50_000)
            except redis.exceptions.OutOfMemoryError:
                return True
            return False

        wait_until(lambda: fill("filler"), 20, "Redis is full")

        def refusal() -> Overloaded | None:
            """What is full is measured at each reap; a small job may slip in before."""
            try:
                jobs.append(trial.submit("count", max_new_tokens=5))
            except Overloaded as error:
                return error
            return None

        refused = wait_until(refusal, 5, "new jobs are refused")
        assert refused.code == "memory_full"
        assert refused.retry_after_s > 0
        running_before = trial.readings[:16]
        wait_until(lambda: all(r.future.done() for r in running_before), 60, "running jobs end")
        assert all(worker.process.poll() is None for worker in fleet.workers), "a worker left"
        client.config_set("maxmemory", 0)
        client.delete("filler")

        def is_taken() -> bool:
            try:
                jobs.append(trial.submit("count", max_new_tokens=5))
            except Overloaded:
                return False
            return True

        wait_until(is_taken, 10, "new jobs are taken again")
        trial.watch(jobs[-1:])
        trial.judge()
        assert {ledger_of(fleet, job)["state"] for job in jobs} == {"finished"}
