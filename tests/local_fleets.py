"""A world of local fleets for a test alone: ``pytest.mark.usefixtures("place")``."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.processes import is_alive, wait_until
from tokenfleet.producer import local_fleet
from tokenfleet.producer.local_fleet import LocalFleet
from tokenfleet.wire.local_files import FleetFolder, FleetState, LocalFleetConfig, fleet_folder
from tokenfleet.workers import lifeline

REPOSITORY = Path(__file__).parents[1]
_WORKER = REPOSITORY / "tests" / "integration" / "fleet_worker.py"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This test's own world of fleets: nothing of it is left afterwards, no process above all."""
    root = Path(tempfile.mkdtemp(prefix="tf-"))  # short: socket paths have 107 bytes
    for variable, name in (("XDG_RUNTIME_DIR", "run"), ("XDG_STATE_HOME", "state"), ("TMPDIR", "tmp")):
        (root / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(root / name))
    yield root
    for state in local_fleet.running():
        local_fleet.down(state.name)
    wait_until(lambda: not processes_of(root), timeout_s=15, what=f"left behind: {processes_of(root)}")
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
    command = (
        sys.executable,
        str(_WORKER),
        mode,
        *map(str, arguments),
    )
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


def files_left(place: Path) -> list[Path]:
    return [path for top in ("run", "state", "tmp") for path in (place / top).rglob("*") if not path.is_dir()]
