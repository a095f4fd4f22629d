"""Who uses a local fleet, and when it ends for want of users; private ones end with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from tests.local_fleets import (
    NO_WORKERS,
    REPOSITORY,
    client_of,
    config,
    family_of,
    files_left,
    folder_of,
    state_of,
)
from tests.processes import all_gone, is_alive, throughout, wait_until
from tokenfleet.producer import local_fleet
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.local_files import LocalFleetConfig
from tokenfleet.wire.private_files import write_private

pytestmark = pytest.mark.usefixtures("place")


# ---- shared ----

HOLDER = """
    import sys
    from tests.local_fleets import config
    from tokenfleet.producer.local_fleet import ensure
    fleet = ensure("shared", config(**eval(sys.argv[1])))
    print(fleet.wait_ready(60).pid, flush=True)
    sys.stdin.read()
"""


def start_user(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def kill9(user: subprocess.Popen[str]) -> None:
    user.kill()
    user.communicate()


def test_four_command_lines_at_once_make_one_fleet(place: Path) -> None:
    users = [start_user(HOLDER, "{}") for _ in range(4)]
    pids = {user.stdout.readline().strip() for user in users if user.stdout}
    assert len(pids) == 1
    assert {str(state.pid) for state in local_fleet.running()} == pids
    log = folder_of("shared").supervisor_log.read_text()
    assert log.count("Redis serves") == 1
    for user in users:
        user.communicate("")
        assert user.returncode == 0


def test_a_fleet_outlives_who_started_it_and_stops_when_the_last_user_is_gone(place: Path) -> None:
    first = start_user(HOLDER, "{'idle_stop_s': 0.5}")
    assert first.stdout is not None
    pid = int(first.stdout.readline())
    second = ensure("shared")  # any settings will do
    family = family_of(second)
    kill9(first)
    throughout(lambda: second.state() is not None, 1.2)
    assert state_of(second).pid == pid
    second.close()
    wait_until(lambda: all_gone(family), timeout_s=15)
    assert "stopping: no client" in folder_of("shared").supervisor_log.read_text()


def test_users_who_come_while_it_stops_for_want_of_users_get_a_new_one(place: Path) -> None:
    for _ in range(5):
        with ensure("one", LocalFleetConfig(workers=0, idle_stop_s=0.0)) as fleet, client_of(fleet) as client:
            client.incr("visits")
            visits = int(client.get("visits"))
            assert state_of(fleet).state == "ready"
    assert visits == 5


FROZEN = """
    import os, sys, time
    from pathlib import Path
    from tokenfleet.wire.private_files import try_lock
    supervisor, processes = (try_lock(Path(name), shared=True) for name in sys.argv[1:])
    print(supervisor, processes, flush=True)
    time.sleep(1.5)
    os.close(supervisor)
    time.sleep(2.5)
"""


def test_a_client_that_stands_still_while_it_looks_for_a_fleet_stops_no_start_and_lives(place: Path) -> None:
    with ensure("one", NO_WORKERS):
        local_fleet.down("one")
    folder = folder_of("one")
    frozen = start_user(FROZEN, str(folder.supervisor_lock), str(folder.processes_lock))
    assert frozen.stdout is not None
    assert "None" not in frozen.stdout.readline()
    with ensure("one", NO_WORKERS) as fleet:
        assert state_of(fleet).state == "ready"
    frozen.communicate()
    assert frozen.returncode == 0


def test_running_jobs_are_users_too(place: Path) -> None:
    with ensure("one", config("busy", place, idle_stop_s=0.3)) as fleet:
        fleet.wait_ready(60)
        family = family_of(fleet)
    throughout(lambda: local_fleet.status("one") is not None, 1.0)
    (place / "done").touch()
    wait_until(lambda: all_gone(family), timeout_s=15)


def test_other_settings_are_refused_and_the_same_ones_are_not(place: Path) -> None:
    with ensure("one", config(worker={"model": "a"})) as fleet:
        with pytest.raises(ConfigurationError, match="other settings") as caught:
            ensure("one", config(worker={"model": "b"}))
        assert "tokenfleet down" in caught.value.hint
        with ensure("one", config(worker={"model": "a"}, idle_stop_s=5.0)) as same:
            assert same.url == fleet.url


def test_another_release_is_refused_but_can_be_stopped(place: Path) -> None:
    with ensure("one", NO_WORKERS) as fleet:
        folder, state = folder_of("one"), state_of(fleet)
        write_private(folder.state, msgspec.json.encode({**msgspec.to_builtins(state), "version": "9.9", "new": 1}))
        with pytest.raises(ConfigurationError, match=r"runs tokenfleet 9\.9") as caught:
            ensure("one", NO_WORKERS)
        assert "tokenfleet down" in caught.value.hint
        assert local_fleet.down("one")
        assert not is_alive(state.pid)


@pytest.mark.parametrize("name", ["", "../etc", ".hidden", "a/b", "a" * 41, ".private-1"])
def test_a_name_is_never_a_path(place: Path, name: str) -> None:
    if name != ".private-1":
        with pytest.raises(ConfigurationError, match="fleet's name"):
            ensure(name)
    else:
        assert local_fleet.status(name) is None


# ---- private ----


def test_a_private_fleet_leaves_no_process_and_no_file(place: Path) -> None:
    with ensure(config=config("parent", place), private=True) as fleet:
        fleet.wait_ready(60)
        family = family_of(fleet)
        assert fleet.fleet == "private"
        assert local_fleet.running() == ()
    assert all_gone(family)
    assert files_left(place) == []
    assert all_gone([int(path.read_text()) for path in place.glob("child-*")])


OWNER = """
    import os, sys
    from tests.local_fleets import config, family_of
    from tokenfleet.producer.local_fleet import ensure
    fleet = ensure(config=config("parent", sys.argv[1]), private=True)
    fleet.wait_ready(60)
    print(*family_of(fleet), flush=True)
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "killed with a forked copy alive", "by itself"])
def test_a_private_fleet_ends_with_its_owner(place: Path, end: str) -> None:
    owner = start_user(OWNER, str(place), "fork" if "fork" in end else "")
    assert owner.stdout is not None
    family = [int(word) for word in owner.stdout.readline().split()]
    assert len(family) == 6  # supervisor, Redis and worker with a guard each, the worker's child
    assert all(map(is_alive, family))
    if end == "by itself":
        owner.communicate("")
        assert owner.returncode == 0
        assert all_gone(family)
        assert files_left(place) == []
    else:
        owner.kill()
        owner.wait()
        wait_until(lambda: all_gone(family), timeout_s=10)
        wait_until(lambda: not files_left(place), timeout_s=5)
        owner.communicate("")  # only now a forked copy ends


def test_what_a_private_fleet_left_when_all_was_killed_is_swept_by_the_next(place: Path) -> None:
    owner = start_user(OWNER, str(place), "")
    assert owner.stdout is not None
    family = [int(word) for word in owner.stdout.readline().split()]
    os.kill(family[0], signal.SIGSTOP)  # the supervisor can't clean up
    kill9(owner)
    os.kill(family[0], signal.SIGKILL)
    wait_until(lambda: all_gone(family), timeout_s=10)
    assert files_left(place)
    with ensure(config=NO_WORKERS, private=True):
        pass
    assert files_left(place) == []
