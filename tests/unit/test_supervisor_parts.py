"""The supervisor's parts that need no process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.local_files import LocalFleetConfig, WorkerReport, fleet_folder, runtime_base, state_base
from tokenfleet.wire.private_files import is_locked, last_lines, read, try_lock
from tokenfleet.workers.supervisor_logs import rotate
from tokenfleet.workers.worker_state import report_state


def test_a_log_goes_on_after_its_rotation_and_keeps_one_generation(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not rotate(log, 100)
        writer.write(b"b")
        assert rotate(log, 100)
        writer.write(b"c")  # still the same descriptor
    assert log.read_bytes() == b"c"
    assert (tmp_path / "w.log.1").read_bytes() == b"a" * 100 + b"b"
    assert not rotate(tmp_path / "gone.log")


def test_last_words_are_the_last_lines_that_say_anything(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    assert last_lines(log) == "(no log)"
    log.write_bytes(b"")
    assert last_lines(log) == "(its log is empty)"
    log.write_bytes(b"one\ntwo\n\xff three\n\n")
    assert last_lines(log) == "\ufffd three"
    assert last_lines(log, 2) == "two\n\ufffd three"
    assert last_lines(log, 9, since_bytes=4) == "two\n\ufffd three"
    assert last_lines(log, 1, since_bytes=10**6) == "\ufffd three"  # it was rotated since


def test_locks_are_shared_or_not_and_probed_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "l"
    assert not is_locked(path)
    assert not path.exists()
    shared = [try_lock(path, shared=True) for _ in range(2)]
    assert all(fd is not None for fd in shared)
    assert not is_locked(path)
    assert try_lock(path) is None
    for fd in shared:
        os.close(fd or 0)
    alone = try_lock(path)
    assert alone is not None
    assert is_locked(path)
    os.close(alone)


def test_a_worker_reports_only_where_somebody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_state("ready")
    path = tmp_path / "worker-0.json"
    monkeypatch.setenv("TOKENFLEET_STATE_FILE", str(path))
    report_state("loading", detail="loading weights", progress=0.43)
    assert read(path, WorkerReport) == WorkerReport(state="loading", detail="loading weights", progress=0.43)
    report_state("failed", error=ConfigurationError("No GPU.", hint="Get one."))
    report = read(path, WorkerReport)
    assert report is not None
    assert report.error is not None
    assert (report.detail, report.error.code, report.error.retryable) == ("No GPU.", "configuration_error", False)
    assert json.loads(path.read_text())["state"] == "failed"


def test_folders_follow_the_xdg_rules(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    own = f"tokenfleet-{os.getuid()}"
    assert runtime_base(home) == tmp_path / own / "run"
    assert runtime_base({**home, "XDG_RUNTIME_DIR": "relative"}) == tmp_path / own / "run"
    assert runtime_base({**home, "XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "tokenfleet"
    assert state_base(home) == tmp_path / ".local/state/tokenfleet"
    assert state_base({**home, "XDG_STATE_HOME": "/s"}) == Path("/s/tokenfleet")
    assert fleet_folder("a", home).data == tmp_path / ".local/state/tokenfleet/a"
    assert fleet_folder("a", home, persistent=False).data == tmp_path / own / "data/a"


@pytest.mark.parametrize(
    ("gpus", "workers", "split"),
    [
        (None, 2, [None, None]),
        ((), 2, ["", ""]),
        (("0", "1", "2", "3"), 2, ["0,1", "2,3"]),
        (("0", "0"), 2, ["0", "0"]),
    ],
)
def test_gpus_are_split_evenly(gpus: tuple[str, ...] | None, workers: int, split: list[str | None]) -> None:
    config = LocalFleetConfig(gpus=gpus, workers=workers)
    assert [config.visible_gpus(index) for index in range(workers)] == split
