"""vLLM's or SGLang's own process, stopped but alive: nothing tells so but that no step comes any more."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.test_engine_kills import busiest
from tests.faults.trial import Trial
from tests.fleets import Fleet, wait_until
from tests.installed_engine import MODEL, core_of, needs_one, start, wait_ready
from tests.processes import all_gone

pytestmark = [needs_one, pytest.mark.slow, pytest.mark.timeout(600)]
HANG_S = 8.0


def test_streams_leave_an_engine_whose_process_hangs(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFLEET_HANG_S", str(HANG_S))
    wait_ready(fleet, start(fleet), start(fleet))
    with Trial(fleet) as trial:
        params = {"do_sample": False, "max_new_tokens": 200, "ignore_eos": True, "model": MODEL}
        trial.watch([trial.submit(f"Tell me {k} things about rivers.", **params) for k in range(4)])
        trial.until_streaming(10, timeout_s=120)
        victim = busiest(fleet, trial)
        family = [victim.pid, *(child.pid for child in victim.children())]
        core = core_of(victim)
        trial.fault("SIGSTOP of the engine's process", core.pid)
        os.kill(core.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert victim.wait(60) != 0, "a supervisor would not start it again"
        left_s = time.monotonic() - began
        wait_until(lambda: all_gone(family), 10, "all of its processes are gone")
        verdict = trial.judge(timeout_s=200, may_run_plain=True, may_have=["text_differs", "invalid_utf8"])
        assert verdict.cut_streams >= 1
        assert HANG_S / 2 < left_s < HANG_S + trial.limit(20), "sooner: something else told"
        print(f"the worker was gone {left_s:.1f} s after its engine hung; stalls {sorted(verdict.stalls_s)}")
