"""The guardian: a small process beside each worker that sees it die, ends what it left behind, and gives its jobs to
others at once, instead of after the lease.

It runs in a session of its own, so that killing the worker's whole process group leaves it alone. It watches the
worker by a pidfd (a pipe would stay open in forked children of the worker), and once a second notes the worker's
descendants: an engine's processes may sit in sessions of their own, and once their parent is dead nothing else tells
whose they were.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PATIENCE_S = 10.0
_START_S = 10.0


class Guardian:
    """The worker's side: starts the process, tells it under which id the worker is registered."""

    def __init__(self, redis_url: str, fleet: str) -> None:
        self._redis_url = redis_url
        self._fleet = fleet
        self._process: subprocess.Popen[bytes] | None = None
        self._told = ""

    def start(self) -> None:
        """Before the engine loads: nobody else could tell whose the engine's processes are, if we died meanwhile."""
        if sys.platform == "linux":
            self._start()

    def wait(self) -> None:
        """Until it watches (it says so); not for ever, since a worker without a guardian still has its lease."""
        if self._process is not None and self._process.stdout is not None:
            select.select([self._process.stdout], [], [], _START_S)

    def tell(self, worker_id: str) -> None:
        """Called at every beat; starts the guardian (again, if somebody killed it) and passes on a new id. Linux only:
        elsewhere the lease has to do."""
        if sys.platform != "linux":
            return
        if self._process is None or self._process.poll() is not None:
            self._start()
            self._told = ""
        if worker_id != self._told and self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(worker_id.encode() + b"\n")
                self._process.stdin.flush()
                self._told = worker_id

    def _start(self) -> None:
        # The URL holds a password: it goes by pipe, not on a command line that everybody can read.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenfleet.workers.guardian"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{os.getpid()}\n{self._redis_url}\n{self._fleet}\n".encode())
            self._process.stdin.flush()


class _Watch:
    """The guardian's side: the worker's pid, its last id, and every descendant seen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.worker_id = ""
        self._descendants: dict[int, str] = {}

    def begin(self) -> bool:
        """Look for the first time; False: the worker is gone already."""
        os.set_blocking(0, False)
        self._poller = select.poll()
        self._poller.register(0, select.POLLIN)
        try:
            self._worker = os.pidfd_open(self.pid)
        except ProcessLookupError:  # killed while we started: what it had told us still lies in the pipe
            with contextlib.suppress(BlockingIOError):
                self._hear()
            return False
        self._poller.register(self._worker, select.POLLIN)
        self._look()
        return True

    def wait(self) -> None:
        """Until the worker is gone."""
        while True:
            ready = dict(self._poller.poll(1000))
            if ready.get(0, 0) & (select.POLLIN | select.POLLHUP):
                self._hear()
            if self._worker in ready:
                return
            self._look()

    def _look(self) -> None:
        for pid in _descendants(self.pid):
            self._descendants.setdefault(pid, _started(pid))

    def _hear(self) -> None:
        told = os.read(0, 4096)
        if told:
            self.worker_id = told.decode().strip().splitlines()[-1]
        else:
            self._poller.unregister(0)

    def kill_what_is_left(self) -> None:
        """Its descendants, and theirs; a pid that means another process by now is left alone."""
        for pid, started in self._descendants.items():
            if _started(pid) != started:
                continue
            for each in (*_descendants(pid), pid):
                if each == os.getpid():
                    continue
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(each, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it ended before the look or in the middle of it
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in map(int, (task / "children").read_text().split()):
                    if child != os.getpid():
                        found += [child, *_descendants(child)]
    return found


def _started(pid: int) -> str:
    """Start time in clock ticks: with the pid it names a process for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _bury(redis_url: str, fleet: str, worker_id: str) -> None:
    from redis.exceptions import RedisError

    from tokenfleet.wire import scripts, urls
    from tokenfleet.wire.keys import Keys

    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            with urls.connect(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
                scripts.run_blocking(client, "bury", Keys(fleet).prefix, worker_id)
                return
        except (RedisError, OSError):
            time.sleep(0.2)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its worker does
    head = b""
    while head.count(b"\n") < 3:
        if not (byte := os.read(0, 1)):
            return
        head += byte
    pid, redis_url, fleet = head.decode().splitlines()
    watch = _Watch(int(pid))
    if watch.begin():
        with contextlib.suppress(BrokenPipeError):
            os.write(1, b"w")
        # Only now, for these imports take longer than all before, and in time for the burial.
        import tokenfleet.wire.scripts
        import tokenfleet.wire.urls  # noqa: F401

        watch.wait()
    watch.kill_what_is_left()  # first: Redis may be away, too
    if watch.worker_id:
        _bury(redis_url, fleet, watch.worker_id)


if __name__ == "__main__":
    main()
