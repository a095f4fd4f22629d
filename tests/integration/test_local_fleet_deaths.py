"""Deaths in a local fleet: of its supervisor, Redis, workers, and of what never comes up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.local_fleets import (
    NO_WORKERS,
    client_of,
    config,
    family_of,
    files_left,
    folder_of,
    state_of,
)
from tests.processes import Standstill, all_gone, is_alive, on_this_machine, wait_until
from tokenfleet.producer import local_fleet
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable
from tokenfleet.wire.local_files import LocalFleetConfig
from tokenfleet.workers import lifeline

pytestmark = pytest.mark.usefixtures("place")


def test_a_killed_supervisor_takes_all_with_it_and_the_next_fleet_has_the_data(place: Path) -> None:
    fleet = ensure("one", config("parent", place))
    fleet.wait_ready(60)
    with client_of(fleet) as client:
        client.set("k", "v")
    family = family_of(fleet)
    assert len(family) == 6
    killed_at, stalls = time.monotonic(), Standstill()
    os.kill(family[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(family[0]))
    with pytest.raises(FleetUnavailable, match="died"):
        fleet.wait_ready(10)
    with ensure("one", config("parent", place)) as new:
        assert all_gone(family)  # it did not start beside the old one's remains
        assert time.monotonic() - killed_at - stalls.end() < on_this_machine(10)
        assert new.url == fleet.url
        new.wait_ready(60)
        with client_of(new) as client:
            assert client.get("k") == b"v"
    fleet.close()


def test_a_killed_redis_is_back_under_the_same_url_with_its_data(place: Path) -> None:
    with ensure("one", config()) as fleet, client_of(fleet) as client:
        before = fleet.wait_ready(60)
        client.set("k", "v")
        for _ in range(2):
            pid = state_of(fleet).redis_pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: state_of(fleet).redis_pid not in (0, pid) and state_of(fleet).state == "ready")
            assert client.get("k") == b"v"
        assert state_of(fleet).url == before.url
        assert state_of(fleet).workers[0].pid == before.workers[0].pid


@pytest.mark.parametrize("victim", ["worker", "guard"])
def test_a_killed_worker_is_replaced_and_its_children_are_gone(place: Path, victim: str) -> None:
    with ensure("one", config("parent", place)) as fleet:
        first = fleet.wait_ready(60).workers[0].pid
        child = int((place / f"child-{first}").read_text())
        guard = next(ppid for ppid, pids in lifeline.children_by_parent().items() if first in pids)
        os.kill(first if victim == "worker" else guard, signal.SIGKILL)
        wait_until(lambda: state_of(fleet).workers[0].pid not in (0, first) and state_of(fleet).state == "ready")
        wait_until(lambda: all_gone([first, child, guard]), timeout_s=10)
        assert state_of(fleet).workers[0].restarts == 1


def test_a_worker_that_never_starts_is_given_up_with_its_last_words(place: Path) -> None:
    fleet = ensure("one", config("broken", start_attempts=2))
    with pytest.raises(FleetUnavailable) as caught:
        fleet.wait_ready(60)
    error = caught.value
    assert error.code == "fleet_failed"
    assert "2 times in a row" in error.message
    assert "no weights in the folder" in error.message
    assert error.message.count("attempt of") == 1  # of the last attempt only
    assert str(folder_of("one").worker_log(0)) in error.hint
    # The next user, with better settings, is not stuck with the failed fleet, even while somebody holds on to it.
    with ensure("one", config()) as better:
        better.wait_ready(60)
    fleet.close()


def test_a_workers_own_error_reaches_the_user_at_once_and_the_fleet_makes_room(place: Path) -> None:
    fleet = ensure("one", config("misconfigured", start_attempts=100))
    with pytest.raises(ConfigurationError, match="No such engine: 'warp'") as caught:
        fleet.wait_ready(60)
    assert caught.value.hint == "Use transformers."
    assert state_of(fleet).workers[0].restarts == 0
    pid = state_of(fleet).pid
    fleet.close()
    wait_until(lambda: not is_alive(pid), timeout_s=15)
    last = local_fleet.status("one")
    assert last is not None
    assert last.error is not None
    assert (last.state, last.error.code) == ("failed", "configuration_error")


def test_a_redis_that_never_starts_is_given_up_with_its_last_words(place: Path) -> None:
    with pytest.raises(FleetUnavailable, match="maxmemory"):
        ensure("one", LocalFleetConfig(workers=0, redis_settings={"maxmemory": "a lot"}))


def test_what_survived_supervisor_and_guard_is_killed_by_the_next_fleet(place: Path) -> None:
    with ensure("one", config("forker", place)) as fleet:
        worker = fleet.wait_ready(60).workers[0].pid
        family = family_of(fleet)
        orphan = int((place / f"child-{worker}").read_text())
        for pid in family:
            os.kill(pid, signal.SIGSTOP)  # so that none of them can react to the others' deaths
        for pid in set(family) - {orphan}:
            os.kill(pid, signal.SIGKILL)
        os.kill(orphan, signal.SIGCONT)
        wait_until(lambda: all_gone([pid for pid in family if pid != orphan]))
        assert is_alive(orphan)
    with ensure("one", NO_WORKERS):
        assert not is_alive(orphan)


def test_a_private_fleet_that_fails_leaves_nothing_either(place: Path) -> None:
    with ensure(config=config("misconfigured"), private=True) as fleet, pytest.raises(ConfigurationError, match="warp"):
        fleet.wait_ready(60)
    assert files_left(place) == []


def test_waiting_for_a_slow_load_ends_with_how_far_it_is(place: Path) -> None:
    with ensure("one", config("slow", stop_grace_s=0.2)) as fleet:
        wait_until(lambda: state_of(fleet).progress is not None)
        with pytest.raises(FleetUnavailable, match="loading weights") as caught:
            fleet.wait_ready(0.3)
        assert caught.value.code == "no_worker"
        assert state_of(fleet).progress == 0.43


def test_a_worker_that_does_not_end_is_killed_after_the_grace(place: Path) -> None:
    with ensure("one", config("stubborn", stop_grace_s=0.5)) as fleet:
        fleet.wait_ready(60)
        family = family_of(fleet)
        fleet.stop()
        assert all_gone(family)
