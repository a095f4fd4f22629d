"""Start a process that can't outlive the one that started it, nor leave children of its own behind.

`spawn` puts a small guard process (this file, run as a script: standard library only, one thread) between us and the
command. We keep the write end of a pipe, the *lifeline*; the guard reads it. End of file means that we are gone,
however we went, and the guard then kills every descendant. The pieces and why each is there:

==================  ==================================================================================================
lifeline            a parent-death signal alone fires when the *thread* that started the child ends, so a program that
                    starts its fleet from a short-lived thread would lose it; a pipe closes with the process
sub-reaper          engines start processes in sessions of their own; when these lose their parent they are handed to
                    the guard, which finds them by descent, not by process group
parent-death signal covers SIGKILL of the guard; sound here, because the guard has one thread
own session         neither Ctrl-C in a terminal nor a signal to our group reaches guard or command
==================  ==================================================================================================
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_REAP_S = 8.0  # a process in an uninterruptible wait (a GPU driver's) may take longer than any kill


def is_supported() -> bool:
    return sys.platform == "linux"


class Guarded:
    """A running command and its guard. Close it, or end this process, and it is killed with all its descendants."""

    def __init__(self, guard: subprocess.Popen[bytes], lifeline_fd: int, report_fd: int) -> None:
        self._guard = guard
        self._lifeline_fd = lifeline_fd
        self._report_fd = report_fd
        self._pid: int | None = None
        _open.add(self)

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    @property
    def pid(self) -> int:
        """The command's own process id (its group and session have the same); 0 if it could not be started."""
        if self._pid is None:
            with os.fdopen(self._report_fd, "rb") as report:
                self._pid = int(report.readline() or 0)
        return self._pid

    def poll(self) -> int | None:
        """None while anything of the command lives, else its exit status; 128 + n if signal n ended it."""
        status = self._guard.poll()
        if status is None:
            return None
        self._close_lifeline()
        return status if status >= 0 else 128 - status  # the guard itself was killed

    def wait(self, timeout_s: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        self._guard.wait(timeout_s)
        status = self.poll()
        assert status is not None
        return status

    def terminate(self) -> None:
        """Ask the command (not its children) to end, with SIGTERM."""
        self._guard.send_signal(signal.SIGTERM)

    def cut(self) -> None:
        """Have the command and all its descendants killed, without waiting for it."""
        self._close_lifeline()

    def kill(self) -> None:
        """Kill the command and all its descendants, and wait until they are gone."""
        self.cut()
        self._guard.wait(_REAP_S + 2)

    def _close_lifeline(self) -> None:
        if self._lifeline_fd >= 0:
            fd, self._lifeline_fd = self._lifeline_fd, -1
            os.close(fd)


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    output: IO[bytes] | int | None = None,
    held_fds: Sequence[int] = (),
) -> Guarded:
    """Start ``command`` under a guard, with standard input empty and both outputs to ``output``.

    ``held_fds`` stay open in guard and command (not in this process' other children): a lock held through them is
    free once, and not before, all of the command is gone.
    """
    lifeline_read, lifeline_write = os.pipe()
    report_read, report_write = os.pipe()
    # -I -S: neither site-packages nor the environment; 20 ms instead of 100, and nothing to import that could break.
    guard = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(lifeline_read), str(report_write)]
    try:
        process = subprocess.Popen(
            [*guard, *command],
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(lifeline_read, report_write, *held_fds),
            start_new_session=True,
        )
    except BaseException:
        os.close(lifeline_write)
        os.close(report_read)
        raise
    finally:
        os.close(lifeline_read)
        os.close(report_write)
    return Guarded(process, lifeline_write, report_read)


_open: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked copy of this process, which would else keep the pipes open after our death."""
    for guarded in _open:
        guarded.cut()


os.register_at_fork(after_in_child=_let_go)


# ---- the guard process ----------------------------------------------------------------------------------------------


def _guard(lifeline_fd: int, report_fd: int, command: Sequence[str]) -> NoReturn:
    os.set_inheritable(lifeline_fd, False)
    os.set_inheritable(report_fd, False)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in (*_FORWARDED, signal.SIGCHLD, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _note)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    libc = ctypes.CDLL(None)
    adopt_orphans()
    guard_pid = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, libc, guard_pid)
    os.write(report_fd, b"%d\n" % child)
    os.close(report_fd)
    _leave(_watch(child, lifeline_fd, wake_read))


def adopt_orphans() -> None:
    """From now on, descendants of this process that lose their parent become its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _become(command: Sequence[str], libc: ctypes.CDLL, guard_pid: int) -> NoReturn:
    try:
        os.setsid()
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != guard_pid:
            os._exit(128 + signal.SIGKILL)  # the guard died before the line above took hold
        signal.set_wakeup_fd(-1)
        for number in (*_FORWARDED, signal.SIGCHLD, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], list(command))  # noqa: S606  no shell is meant
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _watch(child: int, lifeline_fd: int, wake_fd: int) -> int:
    """The command's exit status, or 128 + SIGKILL once the lifeline is cut. Everything below us is dead afterwards."""
    poller = select.poll()
    poller.register(lifeline_fd, select.POLLIN)
    poller.register(wake_fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if lifeline_fd in ready and not os.read(lifeline_fd, 1):
            status = 128 + signal.SIGKILL
            break
        if wake_fd in ready:
            for number in os.read(wake_fd, 512):
                if number in _FORWARDED:
                    os.kill(child, number)
        ended = _reap(child)
        if ended is not None:
            status = ended
            break
    deadline = time.monotonic() + _REAP_S
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _reap(child)
        time.sleep(0.005)
    return status


def _reap(child: int) -> int | None:
    """Collect all dead children (adopted ones too); the exit status of ``child`` if it is among them."""
    ended = None
    with contextlib.suppress(ChildProcessError):
        while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = reaped
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                ended = code if code >= 0 else 128 - code
    return ended


def _leave(status: int) -> NoReturn:
    os._exit(status)


def _note(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells the loop; a handler has to exist for that."""


def descendants(ancestor: int) -> list[int]:
    """All processes below ``ancestor`` (zombies too)."""
    children = children_by_parent()
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def children_by_parent() -> dict[int, list[int]]:
    """Every process of the machine, by the kernel's word for who is whose parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name stands in brackets and may hold anything, brackets too; state and parent follow it.
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    return children


if __name__ == "__main__":
    _guard(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
