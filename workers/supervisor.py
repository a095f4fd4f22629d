"""The supervisor of a local fleet: a detached process that owns its Redis and its workers.

``python -m tokenfleet.workers.supervisor FOLDER DATA`` is started by `tokenfleet.producer.local_fleet`, which wrote
FOLDER/config.json; `tokenfleet.wire.local_files` has the files by which all sides talk. One thread, one loop.

It stops on SIGTERM, when the last client has been gone for a while, or, for a private fleet, when its owner is gone.
The order: no new work (SIGTERM to the workers, which finish or hand over what they run) → workers gone → Redis last, so
that whatever they had to say is in the append-only file. A second SIGTERM, or the owner's death, skips the waiting.
Killed outright, it takes everything with it all the same: see `tokenfleet.workers.lifeline`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

import tokenfleet
from tokenfleet.wire.errors import ErrorBody, FleetUnavailable, TokenfleetError
from tokenfleet.wire.local_files import (
    FleetFolder,
    FleetState,
    LocalFleetConfig,
    WorkerState,
    boot_ticks,
)
from tokenfleet.wire.private_files import make_private, read, try_lock, write_private
from tokenfleet.workers import lifeline
from tokenfleet.workers.embedded_server import EmbeddedServer
from tokenfleet.workers.supervisor_logs import rotate
from tokenfleet.workers.supervisor_worker import WorkerProcess

log = logging.getLogger("tokenfleet.supervisor")

_BUSY_TICK_S, _QUIET_TICK_S = 0.05, 0.5
_HOUSEKEEPING_S = 1.0
_LEFTOVERS_S = 2.0  # how long the last fleet's guards get before we kill what they left ...
_LEFTOVERS_END_S = 20.0  # ... and how long the kernel may take to end it: GPU memory is given back slowly
_LOCK_S = 30.0
_REDIS_ATTEMPTS = 5
_FAILED_LINGER_S = 2.0  # a failed fleet with no client left has nobody to tell


class Supervisor:
    """``owner_fd`` is the read end of a private fleet's lifeline: its end of file is the owner's death."""

    def __init__(self, folder: FleetFolder, config: LocalFleetConfig, env: Mapping[str, str], owner_fd: int | None):
        self._folder = folder
        self._config = config
        self._env = env
        self._owner_fd = owner_fd
        self._stops = 0  # signals seen; the second one means: at once
        self._is_orphaned = False
        self._has_child_died = False
        self._state = FleetState(
            state="starting",
            name=folder.name,
            version=tokenfleet.__version__,
            pid=os.getpid(),
            boot=boot_ticks(os.getpid()),
            detail="starting Redis",
            media_folder=str(config.worker.get("media_folder") or folder.data / "media"),
        )
        self._redis: EmbeddedServer | None = None
        self._redis_deaths = 0
        self._redis_next_start = 0.0
        self._is_redis_ready = False
        self._was_ready = False
        self._workers: list[WorkerProcess] = []
        self._processes_lock = -1
        self._last_use = self._last_housekeeping = time.monotonic()
        self._wake_fd = self._wake_on_signals()

    def publish(self, **changes: object) -> None:
        """Let all who watch know, if anything changed."""
        state = msgspec.structs.replace(self._state, **changes)
        if state != self._state or not self._folder.state.exists():
            if state.state != self._state.state:
                log.info("%s %s", state.state, state.detail)
            try:
                write_private(self._folder.state, msgspec.json.encode(state))
            except OSError as error:  # a full disk is no reason to stop serving; the next tick tries again
                log.warning("can't write %s: %s", self._folder.state, error.strerror)
            else:
                self._state = state

    def run(self) -> None:
        """Until the fleet is to stop. Whatever goes wrong with the fleet ends up in its state, not in an exception."""
        try:
            self._prepare()
            while not (self._stops or self._is_orphaned or self._is_unused()):
                if self._state.state != "failed":
                    self._tend(time.monotonic())
                is_settled = self._state.state in ("ready", "failed")
                self._sleep(_QUIET_TICK_S if is_settled else _BUSY_TICK_S)
        except (TokenfleetError, OSError) as error:
            if isinstance(error, OSError):  # a full disk, no more processes, a file that is none
                what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
                error = FleetUnavailable(f"The fleet can't be run here: {what}.", code="fleet_failed")
            self._fail(error.to_body())
            while not (self._stops or self._is_orphaned or self._is_unused()):
                self._sleep(_QUIET_TICK_S)
        finally:
            self._shut_down()

    # ---- what runs ----

    def _prepare(self) -> None:
        lifeline.adopt_orphans()  # a guard that is killed leaves us its worker's children
        self._processes_lock = self._sole_use()
        make_private(self._folder.data)
        self._redis = EmbeddedServer(self._folder.path, self._folder.data, self._config.redis_settings)
        self._redis.spawn(held_fds=(self._processes_lock,))
        settings = {
            "redis_url": self._redis.url,
            "fleet": self._folder.fleet,
            "media_folder": self._state.media_folder,
            **self._config.worker,
        }
        write_private(self._folder.worker_settings, msgspec.json.encode(settings))
        self._workers = [
            WorkerProcess(index, self._folder, self._config, self._env, self._processes_lock)
            for index in range(self._config.workers)
        ]

    def _sole_use(self) -> int:
        """The lock that all our processes will hold. Waits for those of a supervisor that was killed to be gone."""
        began = time.monotonic()
        while (lock := try_lock(self._folder.processes_lock)) is None:
            self.publish(detail="waiting for the last fleet's processes to end")
            if time.monotonic() > began + _LEFTOVERS_END_S:
                raise FleetUnavailable("Processes of an older fleet don't end.", code="fleet_failed")
            if time.monotonic() > began + _LEFTOVERS_S:
                _kill_holders(self._folder.processes_lock)
            self._sleep(_BUSY_TICK_S)
        return lock

    def _tend(self, now: float) -> None:
        self._tend_redis(now)
        if self._is_redis_ready:
            for worker in self._workers:
                worker.tend(now)
        if self._has_child_died:
            self._has_child_died = False
            self._kill_strays()
        if now - self._last_housekeeping > _HOUSEKEEPING_S:
            self._last_housekeeping = now
            for file in self._folder.path.glob("*.log"):
                rotate(file)
        self._publish_progress()

    def _tend_redis(self, now: float) -> None:
        """Redis is started again for as long as it comes up; workers wait for it, they aren't restarted."""
        redis = self._redis
        assert redis is not None
        try:
            if redis.guard_pid == 0 and now >= self._redis_next_start:
                redis.spawn(held_fds=(self._processes_lock,))
            elif self._is_redis_ready:
                redis.check_alive()
            elif redis.is_ready():
                self._is_redis_ready, self._redis_deaths = True, 0
                log.info("Redis serves, pid %d", redis.pid)
        except (FleetUnavailable, OSError) as error:
            log.warning("%s", error)
            self._is_redis_ready = False
            self._redis_deaths += 1
            self._redis_next_start = now + 0.1 * 2**self._redis_deaths if self._redis_deaths > 1 else now
            if self._redis_deaths >= _REDIS_ATTEMPTS:
                raise

    def _publish_progress(self) -> None:
        assert self._redis is not None
        workers = tuple(worker.state for worker in self._workers)
        shown = {"workers": workers, "url": self._redis.url, "redis_pid": self._redis.pid, "progress": None}
        unfinished = [worker for worker in workers if worker.state != "ready"]
        if not self._is_redis_ready:
            self.publish(state="starting", detail="starting Redis", **shown)
        elif not workers or len(unfinished) < len(workers):
            self._was_ready = True
            self.publish(state="ready", detail=_detail(unfinished, len(workers)), **shown)
        elif all(worker.state == "failed" for worker in workers):
            self.publish(**shown)
            self._fail(next(worker.error for worker in workers if worker.error is not None))
        else:
            shown["progress"] = next((w.progress for w in unfinished if w.state == "loading"), None)
            self.publish(state="loading", detail=_detail(unfinished, len(workers)), **shown)

    def _fail(self, error: ErrorBody) -> None:
        """Redis goes on for clients that are attached: their jobs wait, or expire, as the ledger says."""
        log.error("the fleet failed: %s", error.message)
        self.publish(state="failed", detail=error.message, error=error)

    def _kill_strays(self) -> None:
        """Children that we did not start were handed to us when their guard was killed."""
        known = {worker.guard_pid for worker in self._workers} | {self._redis.guard_pid if self._redis else 0}
        for pid in lifeline.children_by_parent().get(os.getpid(), []):
            if pid not in known:
                log.warning("killing process %d, left behind by a killed guard", pid)
                for stray in (*lifeline.descendants(pid), pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(stray, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    # ---- when to stop ----

    def _is_unused(self) -> bool:
        """Whether nobody has used the fleet for long enough. Once True, nobody can attach: the users' lock is ours."""
        if self._folder.is_private:
            return False  # it ends with its owner, or by its word
        has_failed = self._state.state == "failed"
        limit_s = _FAILED_LINGER_S if has_failed else self._config.idle_stop_s
        lock = try_lock(self._folder.users_lock)
        now = time.monotonic()
        if lock is None or (not has_failed and any(worker.is_busy for worker in self._workers)):
            self._last_use = now
        if lock is None:
            return False
        if limit_s is not None and now - self._last_use >= limit_s:
            log.info("stopping: no client for %.0f s", now - self._last_use)
            if not has_failed:
                self.publish(state="stopping", detail="no client for a while")
            return True  # the lock stays ours until we are gone
        os.close(lock)
        return False

    def _shut_down(self) -> None:
        if self._state.state != "failed":
            self.publish(state="stopping")
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + self._config.stop_grace_s
        while any(worker.is_running for worker in self._workers) and time.monotonic() < deadline:
            if self._stops > 1 or self._is_orphaned:
                break
            self._sleep(_BUSY_TICK_S)
        for worker in self._workers:
            worker.cut()
        for worker in self._workers:
            worker.kill()
        if self._redis is not None:
            if self._is_orphaned:
                self._redis.kill()
            else:
                self._redis.stop()
        self._clean_up()
        log.info("stopped")

    def _clean_up(self) -> None:
        """Locks stay (whoever waits for one must wait for the same file), logs too; a private fleet leaves nothing."""
        if self._folder.is_private or not self._config.persistent:
            shutil.rmtree(self._folder.data, ignore_errors=True)
        if self._folder.is_private:
            shutil.rmtree(self._folder.path, ignore_errors=True)
            return
        kept = {self._folder.state.name} if self._state.state == "failed" else set()
        for file in (*self._folder.path.glob("*.json"), *self._folder.path.glob("redis.*")):
            if file.suffix != ".log" and file.name not in kept:
                file.unlink(missing_ok=True)

    # ---- the loop's one wait ----

    def _sleep(self, seconds: float) -> None:
        """Less if a child died, a signal came or the owner is gone."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if self._owner_fd is not None:
            poller.register(self._owner_fd, select.POLLIN)
        for fd, _ in poller.poll(seconds * 1000):
            if fd == self._wake_fd:
                seen = os.read(fd, 512)
                self._stops += sum(number in (signal.SIGTERM, signal.SIGINT) for number in seen)
                self._has_child_died |= signal.SIGCHLD in seen
            elif not os.read(fd, 1):
                log.info("the owner is gone")
                self._is_orphaned = True
                self._owner_fd = None

    @staticmethod
    def _wake_on_signals() -> int:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)  # the byte in the pipe is all we need
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        return read_fd


def _detail(unfinished: list[WorkerState], total: int) -> str:
    return "; ".join(
        (f"worker {w.index}: " if total > 1 else "") + (w.detail or w.state) for w in unfinished if w.state != "waiting"
    )


def _kill_holders(lock: Path) -> None:
    """Kill whatever survived both its guard and its supervisor, known by the lock it still holds."""
    wanted = lock.stat()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            files = [file for file in (entry / "fd").iterdir() if file.readlink().name == lock.name]
            held = [file.stat() for file in files if not _is_probe(entry / "fdinfo" / file.name)]
            if any((file.st_dev, file.st_ino) == (wanted.st_dev, wanted.st_ino) for file in held):
                log.warning("killing process %s, left behind by an older fleet", entry.name)
                os.kill(int(entry.name), signal.SIGKILL)


def _is_probe(fdinfo: Path) -> bool:
    """A client that only looks whether the lock is free shares it for an instant; it may stand still just then."""
    return any(line.startswith("lock:") and " READ " in line for line in fdinfo.read_text().splitlines())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenfleet.workers.supervisor", description=__doc__)
    parser.add_argument("folder", type=Path, help="the fleet's runtime folder; its name is the fleet's")
    parser.add_argument("data", type=Path, help="the folder of its data")
    parser.add_argument("--owner-fd", type=int, help="a pipe whose end of file ends the fleet (private fleets)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    os.umask(0o077)
    folder = FleetFolder(args.folder.name, args.folder.absolute(), args.data.absolute())
    started_fd = _detach()
    lock = _supervisor_lock(folder)
    if lock is None:
        log.error("fleet %s has a supervisor", folder.name)
        return 1
    config = read(folder.config, LocalFleetConfig)
    if config is None:
        log.error("%s can't be read", folder.config)
        return 1
    if args.owner_fd is not None:
        os.set_inheritable(args.owner_fd, False)
    supervisor = Supervisor(folder, config, dict(os.environ), args.owner_fd)
    supervisor.publish()
    os.write(started_fd, b"1")
    os.close(started_fd)
    os.chdir("/")
    supervisor.run()
    return 0


def _detach() -> int:
    """Go on as nobody's child. Who called us gets status 0 once something is written to the descriptor returned."""
    read_fd, write_fd = os.pipe()
    if os.fork():
        os.close(write_fd)
        os._exit(0 if os.read(read_fd, 1) else 1)
    os.close(read_fd)
    return write_fd


def _supervisor_lock(folder: FleetFolder) -> int | None:
    """Held until we end. Tried for long: clients that look whether we live hold it for an instant, and one of them may
    stand still just then. Who starts us made sure that there is no other supervisor, and gives up by itself."""
    began = time.monotonic()
    while (lock := try_lock(folder.supervisor_lock)) is None and time.monotonic() < began + _LOCK_S:
        time.sleep(0.01)
    return lock


if __name__ == "__main__":
    sys.exit(main())
