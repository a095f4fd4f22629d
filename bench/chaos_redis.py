"""Trials of Redis: restarted, away, emptied, failed over by real sentinels."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import redis

from bench.chaos_report import Row
from bench.chaos_run import Run, Scale, judged, streaming, streaming_on, until_all_go_on
from tests.fleets import wait_until
from tests.sentinels import replicated
from tests.servers import new_fleet_name


def redis_restarts(scale: Scale, seed: int) -> Row:
    """SIGKILL of Redis, and a new one over its append-only file."""
    with streaming(scale, seed) as run:
        went_on = []
        for _ in range(scale.outages):
            run.fault("redis SIGKILL", cuts=False)
            run.fleet.redis.kill9()
            run.fleet.redis.restart()
            went_on.append(until_all_go_on(run))
            run.pause(1.0, 2.0)
        row = judged(run, "Redis killed and restarted with AOF", seed, scale.streams * scale.outages)
        row.recoveries_s = went_on
        return row


def redis_away(scale: Scale, seed: int) -> Row:
    """Down for 10 s."""
    with streaming(scale, seed) as run:
        run.fault("redis away", cuts=False)
        run.fleet.redis.kill9()
        time.sleep(10)
        run.fleet.redis.restart()
        went_on = until_all_go_on(run)
        row = judged(run, "Redis down for 10 s", seed, scale.streams)
        row.recoveries_s = [went_on]
        row.notes = row.notes or _attempts(run)
        return row


def _attempts(run: Run) -> str:
    client: redis.Redis = run.fleet.redis.client(decode_responses=True)
    prefix = f"tokenfleet:{run.fleet.redis.fleet}:job:"
    epochs = [client.hmget(prefix + r.job.id, "epoch", "strikes") for r in run.trial.readings]
    return f"{sum(int(e) > 1 for e, _ in epochs)} takeovers, {sum(int(s) for _, s in epochs)} strikes"  # type: ignore[union-attr]


def redis_empty(scale: Scale, seed: int) -> Row:
    """Restarted without its data: every reader is told, and the fleet serves again."""
    with streaming(scale, seed) as run:
        run.fault("lose all", cuts=False)
        run.fleet.redis.kill9()
        run.fleet.redis.restart(empty=True)
        back = time.monotonic()
        run.trial.until_over(30)
        told_s = time.monotonic() - back

        def serves() -> bool:
            try:
                return bool(run.trial.submit("count", max_new_tokens=5, model="scripted").result(20))
            except Exception:
                return False

        wait_until(serves, 30, "it serves again")
        row = judged(run, "Redis restarted empty", seed, scale.streams)
        row.recoveries_s = [told_s]
        row.notes = row.notes or "recovery: until all readers had `lost_state`"
        return row


def failover(scale: Scale, seed: int, replicas: int = 0) -> Row:
    """SIGKILL of the master; real sentinels make a replica the master."""
    options = {"replicas": 2, "min_replicas_to_write": "1"} if replicas else {"replicas": 1}
    with replicated(new_fleet_name(), **options) as cluster, tempfile.TemporaryDirectory(prefix="tf-chaos-") as folder:
        cluster.replicas = replicas
        with streaming_on(cluster, Path(folder), scale, seed) as run:
            run.fault("failover", cuts=False)
            cluster.kill_master()
            went_on = until_all_go_on(run)
            name = "Sentinel failover, `replicas=1`" if replicas else "Sentinel failover, replication not waited for"
            row = judged(run, name, seed, scale.streams)
            row.recoveries_s = [went_on]
            lost = sum(reading.error is not None for reading in run.trial.readings)
            row.notes = row.notes or f"{lost} `lost_state`; down-after 1 s"
            return row


def failover_wait(scale: Scale, seed: int) -> Row:
    """The same, with a replica waited for."""
    return failover(scale, seed, replicas=1)
