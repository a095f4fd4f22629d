"""Local fleets: real supervisors, real Redis, real worker processes, real kills."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from tests.processes import all_gone, eventually, is_alive, on_this_machine, throughout
from tokenfleet.producer import local_fleet, local_fleet_steps
from tokenfleet.producer.local_fleet import LocalFleet, ensure
from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable
from tokenfleet.wire.local_files import FleetFolder, FleetState, LocalFleetConfig, fleet_folder
from tokenfleet.wire.private_files import read, try_lock, write_private
from tokenfleet.wire.urls import to_celery
from tokenfleet.workers import lifeline

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This test's own world of fleets: nothing of it is left afterwards, no process above all."""
    root = Path(tempfile.mkdtemp(prefix="tf-"))  # short: socket paths have 107 bytes
    for variable, name in (("XDG_RUNTIME_DIR", "run"), ("XDG_STATE_HOME", "state"), ("TMPDIR", "tmp")):
        (root / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(root / name))
    yield root
    for state in local_fleet.running():
        local_fleet.down(state.name)
    eventually(lambda: not processes_of(root), within_s=15, what=f"left behind: {processes_of(root)}")
    shutil.rmtree(root)


def processes_of(root: Path) -> list[str]:
    """Command lines of all processes that were started in this test's world, by what their environment says."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            pid = int(entry.name) if entry.name.isdigit() else 0
            if pid in (0, os.getpid()) or not is_alive(pid):
                continue
            if f"XDG_RUNTIME_DIR={root}/run".encode() in (entry / "environ").read_bytes():
                found.append(f"{pid} {(entry / 'cmdline').read_bytes()[-150:]!r}")
        except (OSError, ValueError):
            continue
    return found


def config(mode: str = "serve", *arguments: object, **settings: Any) -> LocalFleetConfig:
    command = (sys.executable, str(HERE / "fleet_worker.py"), mode, *map(str, arguments))
    return LocalFleetConfig(**{"command": command, "cwd": str(REPOSITORY), **settings})


NO_WORKERS = LocalFleetConfig(workers=0)


def folder_of(name: str) -> FleetFolder:
    return fleet_folder(name, os.environ)


def state_of(fleet: LocalFleet) -> FleetState:
    state = fleet.state()
    assert state is not None
    return state


def family_of(fleet: LocalFleet) -> list[int]:
    """Every process of a fleet: supervisor, guards, Redis, workers and their children."""
    supervisor = state_of(fleet).pid
    pids = [supervisor, *lifeline.descendants(supervisor)]
    assert state_of(fleet).redis_pid in pids
    return pids


def client_of(fleet: LocalFleet) -> redis.Redis:
    return redis.Redis.from_url(fleet.url)


# ---- up and down ----


def test_a_fleet_comes_up_step_by_step_and_goes_down_workers_first(place: Path) -> None:
    seen: list[FleetState] = []
    slowly = config("serve", 0.5, workers=2, worker={"model": "small"})  # slow enough to be seen on a busy machine
    fleet = ensure("one", slowly, on_progress=seen.append)
    state = fleet.wait_ready(30, on_progress=seen.append)
    assert fleet.models == state.models == ("small",)
    loads = [s for s in seen if s.state == "loading" and s.progress is not None]
    assert loads
    assert all(0 <= s.progress < 1 and "loading weights" in s.detail for s in loads)
    assert [s.state for s in seen][-1] == "ready"
    eventually(lambda: all(w.state == "ready" for w in state_of(fleet).workers))
    family = family_of(fleet)
    workers = {worker.pid for worker in state_of(fleet).workers}
    assert len(family) == 1 + 2 * 3  # supervisor; guard and command of Redis and of each worker
    fleet.stop()
    assert all_gone(family)
    assert local_fleet.status("one") is None
    with ensure("one", NO_WORKERS) as again, client_of(again) as client:
        # Redis outlived them, and wrote down what they said last.
        assert {int(pid) for pid in client.lrange("goodbyes", 0, -1)} == workers
        assert again.url == fleet.url


def test_everything_is_the_owners_alone(place: Path) -> None:
    with ensure("one", config(worker={"hf_token": "secret"})) as fleet:
        fleet.wait_ready(60)
        folder = folder_of("one")
        for path in (folder.path, folder.data, folder.path.parent, *folder.path.iterdir(), *folder.data.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE((folder.path / "redis.sock").stat().st_mode) == 0o700
        password = fleet.url.split("@")[0].split(":")[-1]
        for pid in family_of(fleet):
            assert password.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        for log in folder.path.glob("*.log"):
            assert password not in log.read_text()


def test_workers_find_settings_report_file_and_gpus_before_they_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENFLEET_REDIS_URL", "redis://elsewhere/0")  # would override what the file says
    monkeypatch.setenv("TOKENFLEET_MODEL", "another")
    wanted = config(workers=2, gpus=("0", "1", "4", "5"), worker={"model": "m", "engine_args": {"dtype": "float16"}})
    with ensure("one", wanted) as fleet:
        fleet.wait_ready(60)
        eventually(lambda: all(w.state == "ready" for w in state_of(fleet).workers))
        for worker, gpus in zip(state_of(fleet).workers, ("0,1", "4,5"), strict=True):
            environ = Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
            env = dict(line.split("=", 1) for line in environ if "=" in line)
            assert env["CUDA_VISIBLE_DEVICES"] == gpus
            assert "TOKENFLEET_REDIS_URL" not in env
            assert "TOKENFLEET_MODEL" not in env
            settings = json.loads(Path(env["TOKENFLEET_CONFIG"]).read_text())
            media = str(place / "state" / "tokenfleet" / "one" / "media")
            assert settings == {"redis_url": fleet.url, "fleet": "one", "media_folder": media, **wanted.worker}


@pytest.mark.parametrize(("workers", "gpus"), [(2, ("0", "1", "2")), (0, ("0",)), (-1, None)])
def test_what_cannot_be_split_among_workers_is_refused(workers: int, gpus: tuple[str, ...] | None) -> None:
    with pytest.raises(ConfigurationError):
        LocalFleetConfig(workers=workers, gpus=gpus)


def test_real_celery_workers_serve_under_the_supervisor(place: Path) -> None:
    from celery import Celery

    command = (sys.executable, "-m", "celery", "-A", "tests.integration.tiny_celery_app", "worker", "--pool", "solo")
    with ensure("one", LocalFleetConfig(command=command, cwd=str(REPOSITORY))) as fleet:
        fleet.wait_ready(60)
        assert fleet.models == ("adder",)
        url = to_celery(fleet.url)
        with Celery(broker=url, backend=url) as app:
            assert app.send_task("tiny.add", (40, 2)).get(timeout=30) == 42
        family = family_of(fleet)
        fleet.stop()
        assert all_gone(family)
    assert "Warm shutdown" in folder_of("one").worker_log(0).read_text()


async def test_async_users_do_the_same_without_blocking_their_loop(place: Path) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with await local_fleet.ensure_async("one", config()) as fleet:
        await fleet.wait_ready_async(30)
        assert fleet.models == ("m",)
        await fleet.stop_async()
    ticking.cancel()
    assert ticks > 20
    assert local_fleet.running() == ()


async def test_a_cancelled_start_is_in_nobodys_way(place: Path) -> None:
    starting = asyncio.create_task(local_fleet.ensure_async("one", config()))
    await asyncio.sleep(0.05)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with ensure("one", config()) as fleet:
        fleet.wait_ready(60)


# ---- shared ----

HOLDER = """
    import sys
    from tests.integration.test_local_fleet import config
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
    eventually(lambda: all_gone(family), within_s=15)
    assert "stopping: no client" in folder_of("shared").supervisor_log.read_text()


def test_users_who_come_while_it_stops_for_want_of_users_get_a_new_one(place: Path) -> None:
    for _ in range(5):
        with ensure("one", LocalFleetConfig(workers=0, idle_stop_s=0.0)) as fleet, client_of(fleet) as client:
            client.incr("visits")
            visits = int(client.get("visits"))
            assert state_of(fleet).state == "ready"
    assert visits == 5


def test_running_jobs_are_users_too(place: Path) -> None:
    with ensure("one", config("busy", place, idle_stop_s=0.3)) as fleet:
        fleet.wait_ready(60)
        family = family_of(fleet)
    throughout(lambda: local_fleet.status("one") is not None, 1.0)
    (place / "done").touch()
    eventually(lambda: all_gone(family), within_s=15)


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


def files_left(place: Path) -> list[Path]:
    return [path for top in ("run", "state", "tmp") for path in (place / top).rglob("*") if not path.is_dir()]


OWNER = """
    import os, sys
    from tests.integration.test_local_fleet import config, family_of
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
        eventually(lambda: all_gone(family), within_s=10)
        eventually(lambda: not files_left(place), within_s=5)
        owner.communicate("")  # only now a forked copy ends


def test_what_a_private_fleet_left_when_all_was_killed_is_swept_by_the_next(place: Path) -> None:
    owner = start_user(OWNER, str(place), "")
    assert owner.stdout is not None
    family = [int(word) for word in owner.stdout.readline().split()]
    os.kill(family[0], signal.SIGSTOP)  # the supervisor can't clean up
    kill9(owner)
    os.kill(family[0], signal.SIGKILL)
    eventually(lambda: all_gone(family), within_s=10)
    assert files_left(place)
    with ensure(config=NO_WORKERS, private=True):
        pass
    assert files_left(place) == []


# ---- deaths ----


def test_a_killed_supervisor_takes_all_with_it_and_the_next_fleet_has_the_data(place: Path) -> None:
    fleet = ensure("one", config("parent", place))
    fleet.wait_ready(60)
    with client_of(fleet) as client:
        client.set("k", "v")
    family = family_of(fleet)
    assert len(family) == 6
    killed_at = time.monotonic()
    os.kill(family[0], signal.SIGKILL)
    eventually(lambda: not is_alive(family[0]))
    with pytest.raises(FleetUnavailable, match="died"):
        fleet.wait_ready(10)
    with ensure("one", config("parent", place)) as new:
        assert all_gone(family)  # it did not start beside the old one's remains
        assert time.monotonic() - killed_at < on_this_machine(10)
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
            eventually(lambda pid=pid: state_of(fleet).redis_pid not in (0, pid) and state_of(fleet).state == "ready")
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
        eventually(lambda: state_of(fleet).workers[0].pid not in (0, first) and state_of(fleet).state == "ready")
        eventually(lambda: all_gone([first, child, guard]), within_s=10)
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
    eventually(lambda: not is_alive(pid), within_s=15)
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
        eventually(lambda: all_gone([pid for pid in family if pid != orphan]))
        assert is_alive(orphan)
    with ensure("one", NO_WORKERS):
        assert not is_alive(orphan)


def test_a_private_fleet_that_fails_leaves_nothing_either(place: Path) -> None:
    with ensure(config=config("misconfigured"), private=True) as fleet, pytest.raises(ConfigurationError, match="warp"):
        fleet.wait_ready(60)
    assert files_left(place) == []


def test_waiting_for_a_slow_load_ends_with_how_far_it_is(place: Path) -> None:
    with ensure("one", config("slow", stop_grace_s=0.2)) as fleet:
        eventually(lambda: state_of(fleet).progress is not None)
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


# ---- what a crash, or somebody else, left in the way ----


def test_a_stale_runtime_folder_is_taken_over_and_no_stranger_is_killed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("one")
    folder.path.mkdir(parents=True, mode=0o700)
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    stale = FleetState(state="ready", name="one", version="0", pid=bystander.pid, boot=1, url="unix:///gone.sock?db=0")
    write_private(folder.state, msgspec.json.encode(stale))
    (folder.path / "redis.sock").touch()
    folder.worker_report(0).write_text("{")
    try:
        assert local_fleet.status("one") is None
        assert not local_fleet.down("one")
        with ensure("one", config()) as fleet:
            fleet.wait_ready(60)
            assert fleet.url != stale.url
        # Even with a supervisor there, a process that merely got its number is left alone.
        local_fleet.down("one")
        write_private(folder.state, msgspec.json.encode(stale))
        monkeypatch.setattr(local_fleet_steps, "_KILL_S", 0.2)
        lock = try_lock(folder.supervisor_lock)
        assert lock is not None
        with pytest.raises(FleetUnavailable):
            local_fleet.down("one", timeout_s=0.2)
        os.close(lock)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("trap", ["link", "open to others", "somebody else's"])
def test_a_folder_that_others_could_have_prepared_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")  # the fallback lies where everybody can write
    base = place / "tmp" / f"tokenfleet-{os.getuid()}"
    if trap == "link":
        (place / "elsewhere").mkdir(mode=0o700)
        base.symlink_to(place / "elsewhere")
    else:
        base.mkdir(mode=0o700)
        if trap == "open to others":
            base.chmod(0o777)
        elif os.getuid() == 0:
            os.chown(base, 65534, 65534)
        else:
            pytest.skip("only root can give a folder away")
    with pytest.raises(ConfigurationError, match="not safe"):
        ensure("one", NO_WORKERS)


def test_without_a_runtime_directory_the_users_own_temporary_folder_is_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/folder")
    with ensure("one", NO_WORKERS) as fleet:
        assert f"{place}/tmp/tokenfleet-{os.getuid()}/run/one/redis.sock" in fleet.url
        fleet.stop()


def test_a_fleet_that_keeps_nothing_leaves_no_data(place: Path) -> None:
    with ensure("one", LocalFleetConfig(workers=0, persistent=False)) as fleet:
        data = fleet_folder("one", os.environ, persistent=False).data
        assert (data / "appendonlydir").is_dir()
        fleet.stop()
        assert not data.exists()


def test_no_place_to_keep_the_data_is_the_users_to_mend(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "file"))
    with pytest.raises(ConfigurationError, match="can't be made") as caught:
        ensure("one", NO_WORKERS)
    assert "XDG_STATE_HOME" in caught.value.hint


def test_elsewhere_than_on_linux_the_message_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigurationError, match="Linux only") as caught:
        ensure()
    assert "redis_url" in caught.value.hint


def test_finding_a_fleet_imports_neither_workers_nor_engines() -> None:
    code = "import sys, tokenfleet.producer.local_fleet; print([m for m in sys.modules if m.startswith('tokenfleet.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = eval(result.stdout)
    assert not [name for name in loaded if name.startswith(("tokenfleet.workers", "tokenfleet.engines"))]


def test_config_on_disk_reads_back_equal(tmp_path: Path) -> None:
    wanted = config("serve", workers=2, gpus=(), idle_stop_s=None, worker={"a": [1, {"b": None}]})
    write_private(tmp_path / "c.json", msgspec.json.encode(wanted))
    assert read(tmp_path / "c.json", LocalFleetConfig) == wanted
