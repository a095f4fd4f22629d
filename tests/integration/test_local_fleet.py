"""Local fleets: real supervisors, real Redis, real worker processes. They come up, serve, and go down."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.local_fleets import (
    NO_WORKERS,
    REPOSITORY,
    client_of,
    config,
    family_of,
    folder_of,
    state_of,
)
from tests.processes import all_gone, wait_until
from tokenfleet.producer import local_fleet
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.local_files import FleetState, LocalFleetConfig
from tokenfleet.wire.private_files import read, write_private
from tokenfleet.wire.urls import to_celery

pytestmark = pytest.mark.usefixtures("place")


def test_a_fleet_comes_up_step_by_step_and_goes_down_workers_first(place: Path) -> None:
    seen: list[FleetState] = []
    slowly = config("serve", 0.5, workers=2, worker={"model": "small"})  # slow enough to be seen on a busy machine
    fleet = ensure("one", slowly, on_progress=seen.append)
    state = fleet.wait_ready(60, on_progress=seen.append)
    assert fleet.models == state.models == ("small",)
    loads = [s for s in seen if s.state == "loading" and s.progress is not None]
    assert loads
    assert all(0 <= s.progress < 1 and "loading weights" in s.detail for s in loads)
    assert [s.state for s in seen][-1] == "ready"
    wait_until(lambda: all(w.state == "ready" for w in state_of(fleet).workers))
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
        wait_until(lambda: all(w.state == "ready" for w in state_of(fleet).workers))
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
        await fleet.wait_ready_async(60)
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
