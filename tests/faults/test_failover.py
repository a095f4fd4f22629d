"""The master dies and real sentinels make a replica the master: the fleet goes on, and what is lost is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet, wait_until
from tests.sentinels import ReplicatedRedis, replicated
from tests.servers import new_fleet_name
from tokenfleet.wire.errors import FleetUnavailable, LostState

# redis-py's pool of a Sentinel's master drops a connection now and then when the master changes; it is closed when the
# garbage collector finds it, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOKENS = 600
"""At 10 ms each: the streams outlast the failover."""


def fleet_on(cluster: ReplicatedRedis, folder: Path) -> Fleet:
    fleet = Fleet(cluster, folder)  # type: ignore[arg-type]
    for _ in range(2):
        fleet.start_worker(wait=False, salted=True, token_ms=10.0)
    for index, worker in enumerate(fleet.workers):
        fleet.wait_ready(worker, index)
    return fleet


def until_all_go_on(trial: Trial, timeout_s: float = 40) -> float:
    """Seconds until each reader has more, or was told that it is over."""
    since = time.monotonic()
    before = [reading.tokens for reading in trial.readings]
    watched = list(zip(trial.readings, before, strict=True))
    wait_until(lambda: all(r.tokens > n or r.future.done() for r, n in watched), timeout_s, "all go on")
    return time.monotonic() - since


def test_streams_go_on_after_a_failover(tmp_path: Path) -> None:
    """Replication is not waited for: nobody may get other text; who had more than the new master has, is told."""
    with replicated(new_fleet_name()) as cluster:
        fleet = fleet_on(cluster, tmp_path)
        try:
            with Trial(fleet) as trial:
                jobs = trial.submit_many(12, max_new_tokens=TOKENS)
                trial.watch(jobs)
                trial.until_streaming(20)
                trial.fault("failover", cuts=False)
                cluster.kill_master()
                print(f"all streams went on {until_all_go_on(trial):.1f} s after the master's death")
                jobs += trial.submit_many(4, max_new_tokens=20)
                trial.watch(jobs[-4:])
                trial.until_over(60)
                lost = [reading for reading in trial.readings if reading.error is not None]
                assert all(isinstance(reading.error, LostState) for reading in lost)
                print(f"{len(lost)} of {len(jobs)} streams ended with lost_state")
                if not lost:
                    trial.judge()
                    assert {ledger_of(fleet, job)["strikes"] for job in jobs} == {"0"}
                assert all(worker.process.poll() is None for worker in fleet.workers)
        finally:
            fleet.close()


def test_with_replicas_waited_for_a_failover_loses_nothing(tmp_path: Path) -> None:
    """What the replicas don't have is neither delivered nor accepted; so nothing that anybody saw can be lost."""
    settings = {"min_replicas_to_write": "1", "min_replicas_max_lag": "10"}
    with replicated(new_fleet_name(), replicas=2, **settings) as cluster:
        cluster.replicas = 1
        fleet = fleet_on(cluster, tmp_path)
        try:
            with Trial(fleet) as trial:
                jobs = trial.submit_many(12, max_new_tokens=TOKENS)
                trial.watch(jobs)
                trial.until_streaming(20)
                with cluster.frozen_replicas():
                    stood = standing(trial)
                    written = {job.id: written_by(cluster, fleet, job.id) for job in jobs}
                    with pytest.raises(FleetUnavailable):
                        trial.submit("count", max_new_tokens=5)
                    assert [reading.tokens for reading in trial.readings] == stood, "delivered without a replica"
                    ahead = sum(n > k for n, k in zip(written.values(), stood, strict=True))
                    assert ahead, "Redis has nothing more than what was delivered: nothing would be lost"
                    trial.fault("failover", cuts=False)
                    cluster.kill_master()
                went_on_s = until_all_go_on(trial)
                print(f"{ahead} streams had unreplicated tokens; all went on after {went_on_s:.1f} s")
                verdict = trial.judge(timeout_s=90)
                assert verdict.tokens >= 12 * TOKENS
                assert not any(reading.error for reading in trial.readings)
                assert {ledger_of(fleet, job)["strikes"] for job in jobs} == {"0"}
        finally:
            fleet.close()


def standing(trial: Trial) -> list[int]:
    """Tokens of each reader, once what was on its way is through: none has had more for a second."""
    found, since = [reading.tokens for reading in trial.readings], time.monotonic()

    def is_still() -> bool:
        nonlocal found, since
        now = [reading.tokens for reading in trial.readings]
        if now != found:
            found, since = now, time.monotonic()
        return time.monotonic() - since > 1

    wait_until(is_still, 20, "nothing more is delivered")
    return found


def written_by(cluster: ReplicatedRedis, fleet: Fleet, job_id: str) -> int:
    """Tokens that the first master has."""
    with cluster.nodes[0].client() as client:
        return int(client.hget(f"tokenfleet:{fleet.redis.fleet}:job:{job_id}", "tokens") or 0)
