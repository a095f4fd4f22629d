"""Producer and worker die at every single call they make to Redis, before it is made and after its reply was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.crash_points import DIED
from tests.faults.trial import Trial, ledger_of
from tests.fleets import ROOT, Fleet, wait_until
from tokenfleet.wire.keys import Keys, new_id

EVERY = int(os.environ.get("TOKENFLEET_CRASH_POINTS_EVERY", "5"))
"""Which calls are swept, those after others than those before; `make chaos` sweeps all (1)."""


def first_call(when: str) -> int:
    return 1 if when == "before" else 1 + EVERY // 2


class Crasher:
    def __init__(self, fleet: Fleet) -> None:
        script = Path(__file__).with_name("crash_points.py")
        command = [sys.executable, str(script), fleet.redis.url, fleet.redis.fleet, str(fleet.folder)]
        with (fleet.folder / "crasher.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def order(self, **order: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @contextmanager
    def healer(self) -> Iterator[None]:
        """A healthy worker within the block."""
        pid = self.order(role="healer")
        assert pid > 100, "not a process id"
        try:
            yield
        finally:
            self.order(kill=pid)  # and wait: a dying one might still be handed a message

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


@pytest.fixture
def crasher(fleet: Fleet) -> Iterator[Crasher]:
    crasher = Crasher(fleet)
    yield crasher
    crasher.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_may_die_at_any_call(fleet: Fleet, crasher: Crasher, when: str) -> None:
    with crasher.healer(), fleet.redis.client() as client:
        wait_until(lambda: client.exists(Keys(fleet.redis.fleet).models), 30, "a served model")
    with Trial(fleet) as trial:
        trial.client.aio._model = "scripted"
        died, k = 0, first_call(when) - EVERY
        while True:
            k += EVERY
            job = trial.submit("count", max_new_tokens=12)
            trial.watch(job, f"reader-{k}")
            trial.fault(f"crash {when} call {k}", cuts=False)
            status = crasher.order(role="worker", k=k, when=when)
            if status != DIED:
                break
            died += 1
            with crasher.healer():
                trial.until_over(30)
        assert status == 0
        trial.judge(timeout_s=30)
        print(f"died {when} each of {died} calls")
        assert died * EVERY >= 20, "it made suspiciously few calls"
        states = {ledger_of(fleet, reading.job)["state"] for reading in trial.readings}
        assert states == {"finished"}
        # One for the crash; on a machine that stood still the healer's short lease may have lapsed, too.
        assert max(int(ledger_of(fleet, reading.job)["strikes"]) for reading in trial.readings) <= 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_producer_may_die_at_any_call(fleet: Fleet, crasher: Crasher, when: str) -> None:
    """Its job was taken or it was not: never half."""
    with crasher.healer(), Trial(fleet) as trial, fleet.redis.client() as client:
        wait_until(lambda: client.exists(Keys(fleet.redis.fleet).models), 30, "a served model")
        died = taken = 0
        k = first_call(when) - EVERY
        while True:
            k += EVERY
            job = trial.client.job(new_id())
            trial.fault(f"crash {when} call {k}", cuts=False)
            status = crasher.order(role="producer", k=k, when=when, job=job.id)
            if ledger_of(fleet, job):
                taken += 1
                trial.history.note("accepted", job=job.id, n=1, max_new_tokens=12)
                trial.watch(job, f"reader-{k}")
            if status != DIED:
                break
            died += 1
        assert status == 0
        trial.judge(timeout_s=30)
        print(f"died {when} each of {died} calls; {taken} jobs were taken")
        assert died * EVERY >= 8
        assert 1 <= taken <= died + 1
