"""When an engine counts as hung, and when only the clock went on."""

from __future__ import annotations

import pytest

from tokenfleet.workers import health
from tokenfleet.workers.health import PREFILL_S_PER_TOKEN, Progress


class Watched:
    """A `Progress` asked once a second, as the lease's thread does; ``now`` and ``steps`` are the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hang_s: float) -> None:
        self.now, self.steps = 100.0, 0
        monkeypatch.setattr(health.time, "monotonic", lambda: self.now)
        self.progress = Progress(lambda: self.steps, hang_s, beat_s=1.0)

    def beats(self, count: int, running: int = 1, busy_tokens: int = 0) -> list[bool]:
        made = []
        for _ in range(count):
            self.now += 1.0
            made.append(self.progress.is_made(running, busy_tokens))
        return made


def test_no_step_while_a_job_runs_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, hang_s=5.0)
    assert watched.beats(1) == [True]
    assert watched.beats(6) == [True] * 4 + [False] * 2
    watched.steps += 1
    assert watched.beats(5) == [True] * 5


def test_an_idle_engine_need_not_step(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, hang_s=5.0)
    assert watched.beats(60, running=0) == [True] * 60
    assert watched.beats(4) == [True] * 4


def test_the_allowance_grows_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, hang_s=5.0)
    tokens = int(10 / PREFILL_S_PER_TOKEN)
    assert watched.beats(16, busy_tokens=tokens) == [True] * 15 + [False]


def test_a_process_that_stood_still_is_no_hung_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen for a minute, it is asked before the engine had its first turn."""
    watched = Watched(monkeypatch, hang_s=5.0)
    assert watched.beats(2) == [True, True]
    watched.now += 60
    assert watched.beats(1) == [True]
    watched.steps += 1
    assert watched.beats(1) == [True]
    # A hang is one all the same, also where it began before the standstill.
    watched.now += 60
    assert watched.beats(4) == [True, True, False, False]
