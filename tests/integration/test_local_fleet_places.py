"""Where a local fleet keeps its files, and what a crash or somebody else left in the way there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.local_fleets import (
    NO_WORKERS,
    config,
    folder_of,
)
from tokenfleet.producer import local_fleet, local_fleet_steps
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable
from tokenfleet.wire.local_files import FleetState, LocalFleetConfig, fleet_folder
from tokenfleet.wire.private_files import try_lock, write_private

pytestmark = pytest.mark.usefixtures("place")


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


def test_what_the_supervisor_can_not_write_is_told_at_once(place: Path) -> None:
    """It died of it, and was started again and again until whoever asked for the fleet had waited long enough."""
    folder = fleet_folder("default", os.environ)
    (folder.data / "password").mkdir(parents=True)
    folder.data.chmod(0o700)
    with pytest.raises(FleetUnavailable, match="password: Is a directory"):
        ensure()
    local_fleet.down()
