"""The waits of `tokenfleet.producer.local_fleet`: to find or start a fleet, to see it ready, to see it gone.

Each is written once, as a generator of pauses (seconds), and driven by `time.sleep` or by `asyncio.sleep`. Leaving one
early (an exception, a cancelled task) lets go of all locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import msgspec

import tokenfleet
from tokenfleet.wire.errors import CallerError, ConfigurationError, FleetUnavailable, from_body
from tokenfleet.wire.local_files import (
    PRIVATE_PREFIX,
    FleetFolder,
    FleetState,
    LocalFleetConfig,
    Supervision,
    fleet_folder,
    runtime_base,
)
from tokenfleet.wire.private_files import is_locked, last_lines, make_private, read, try_lock, write_private

OnProgress = Callable[[FleetState], None]
T = TypeVar("T")
Steps = Generator[float, None, T]

_PAUSE_S = 0.02
_KILL_S = 15.0  # what a killed supervisor's guards may take, an engine's GPU memory included
_REMOVAL_S = 0.5  # from a supervisor's unlinking of its lock file to the end of its last one
_STALE_S = 60.0


class Ties:
    """What binds this process to a fleet: its share of the users' lock, a private fleet's lifeline, the start lock.

    They are let go by the kernel if the process dies. A forked copy of the process must not keep them."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        _open_ties.add(self)

    def hold(self, what: str, fd: int) -> None:
        self._fds[what] = fd

    def drop(self, what: str) -> None:
        if (fd := self._fds.pop(what, None)) is not None:
            os.close(fd)

    def cut(self) -> None:
        for what in list(self._fds):
            self.drop(what)

    def __bool__(self) -> bool:
        return bool(self._fds)


_open_ties: weakref.WeakSet[Ties] = weakref.WeakSet()


def _cut_in_fork() -> None:
    for ties in list(_open_ties):
        ties.cut()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_cut_in_fork)


# ---- waits -----------------------------------------------------------------------------------------------------------


def drive(steps: Steps[T]) -> T:
    with contextlib.closing(steps):
        while True:
            try:
                pause_s = next(steps)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            time.sleep(pause_s)


async def drive_async(steps: Steps[T]) -> T:
    with contextlib.closing(steps):
        while True:
            try:
                pause_s = next(steps)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            await asyncio.sleep(pause_s)


def ensure_steps(
    name: str, config: LocalFleetConfig | None, private: bool, on_progress: OnProgress | None, timeout_s: float
) -> Steps[tuple[FleetFolder, str, Ties]]:
    if sys.platform != "linux":
        raise ConfigurationError("A local fleet runs on Linux only.", hint="Pass redis_url=... of a running fleet.")
    if private:
        _sweep()
        name = f"{PRIVATE_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    wanted = config or LocalFleetConfig()
    folder = fleet_folder(name, os.environ, persistent=wanted.persistent)
    make_private(folder.path)
    deadline = time.monotonic() + timeout_s
    ties = Ties()
    try:
        while True:
            if (yield from _attach(folder, config, wanted, ties, deadline)):
                state = yield from _served_state(folder, on_progress, deadline)
                if state is not None:
                    return folder, state.url, ties
            ties.cut()  # it was just stopping, or failing: look again
            _check(deadline, folder, "It neither serves nor ends.")
            yield _PAUSE_S
    except BaseException:
        drive(leave_steps(folder, ties))  # at once, even if a cancelled task's loop has to wait
        raise


def _attach(
    folder: FleetFolder, config: LocalFleetConfig | None, wanted: LocalFleetConfig, ties: Ties, deadline: float
) -> Steps[bool]:
    """Tie this process to the running fleet, or to a new one. False: not now, it is about to end."""
    while (start := try_lock(folder.start_lock)) is None:
        _check(deadline, folder, "Others are starting it and don't get on.")
        yield _PAUSE_S
    ties.hold("start", start)
    try:
        # First our share in its use, then a look whether it lives: so it can't stop for want of users in between.
        users = try_lock(folder.users_lock, shared=True)
        if users is None:
            return False
        ties.hold("users", users)
        if not folder.is_supervised():
            yield from _start_supervisor(folder, wanted, ties, deadline)
            return True
        supervision = read(folder.state, Supervision)
        if supervision is None:
            return False
        if supervision.version != tokenfleet.__version__:
            raise ConfigurationError(
                f"Local fleet {folder.name!r} runs tokenfleet {supervision.version}; this is {tokenfleet.__version__}.",
                hint=f"Stop it with `tokenfleet down`, which keeps its data ({folder.data}), or use another name.",
            )
        state = read(folder.state, FleetState)
        if state is None or state.state == "stopping":
            return False
        if state.state == "failed":
            _signal(folder, signal.SIGTERM)  # of no use to anybody: make room for a new try
            return False
        running_config = read(folder.config, LocalFleetConfig)
        if config is not None and running_config is not None and not running_config.serves_as(config):
            raise ConfigurationError(
                f"Local fleet {folder.name!r} runs with other settings.",
                hint="Stop it with `tokenfleet down`, or use another name.",
            )
        return True
    finally:
        ties.drop("start")


def _start_supervisor(folder: FleetFolder, config: LocalFleetConfig, ties: Ties, deadline: float) -> Steps[None]:
    for stale in folder.path.glob("*.json"):  # left by a crash
        stale.unlink(missing_ok=True)
    config = msgspec.structs.replace(config, cwd=config.cwd or str(Path.cwd()))
    write_private(folder.config, msgspec.json.encode(config))
    command = [sys.executable, "-m", "tokenfleet.workers.supervisor", str(folder.path), str(folder.data)]
    owner_read = -1
    if folder.is_private:
        owner_read, lifeline = os.pipe()
        ties.hold("lifeline", lifeline)
        command += ["--owner-fd", str(owner_read)]
    log = os.open(folder.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            command,
            env=_child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of this terminal's Ctrl-C and hang-up
            pass_fds=(owner_read,) if owner_read >= 0 else (),
        )
    finally:
        os.close(log)
        if owner_read >= 0:
            os.close(owner_read)
    try:
        # It detaches itself: the process we started ends as soon as the supervisor has its lock and its state file.
        while process.poll() is None:
            _check(deadline, folder, "Its supervisor doesn't start.")
            yield 0.01
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise FleetUnavailable(
            f"The supervisor of local fleet {folder.name!r} could not start: {last_lines(folder.supervisor_log)}",
            code="fleet_failed",
            hint=f"Its log: {folder.supervisor_log}",
        )


def _served_state(folder: FleetFolder, on_progress: OnProgress | None, deadline: float) -> Steps[FleetState | None]:
    """The fleet's state once its Redis serves; None if it went away without a word."""
    tell = _teller(on_progress)
    while True:
        is_alive = folder.is_supervised()  # before the state: its last word is written before it dies
        state = read(folder.state, FleetState)
        if state is not None:
            _raise_failure(state)
            tell(state)
            if is_alive and state.state in ("loading", "ready"):
                return state
        if not is_alive or (state is not None and state.state == "stopping"):
            return None
        _check(deadline, folder, "Its Redis doesn't start.")
        yield _PAUSE_S


def ready_steps(folder: FleetFolder, timeout_s: float | None, on_progress: OnProgress | None) -> Steps[FleetState]:
    tell = _teller(on_progress)
    deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    while True:
        is_alive = folder.is_supervised()
        state = read(folder.state, FleetState)
        if state is not None:
            _raise_failure(state)
            tell(state)
            if is_alive and state.state == "ready":
                return state
        if not is_alive or state is None or state.state == "stopping":
            raise FleetUnavailable(
                f"Local fleet {folder.name!r} has {'stopped' if state is None or is_alive else 'died'}.",
                code="fleet_failed",
                hint=f"Its log: {folder.supervisor_log}",
            )
        _check(deadline, folder, f"No worker is ready ({state.detail or state.state}).")
        yield 0.05


def down_steps(folder: FleetFolder, timeout_s: float) -> Steps[bool]:
    deadline = time.monotonic() + timeout_s
    is_running = folder.is_supervised()
    supervisor = read(folder.state, Supervision) if is_running else None
    if is_running:
        _signal(folder, signal.SIGTERM)
    while folder.is_supervised():
        if time.monotonic() > deadline:
            _signal(folder, signal.SIGKILL)  # its guards take everything else down
            break
        yield _PAUSE_S
    deadline = time.monotonic() + _KILL_S
    while (
        folder.is_supervised()
        or is_locked(folder.processes_lock)
        or (supervisor is not None and supervisor.is_alive())  # for its last instant, after its locks
    ):
        _check(deadline, folder, "Its processes don't end.")
        yield _PAUSE_S
    return is_running


# ---- pieces ----------------------------------------------------------------------------------------------------------


def leave_steps(folder: FleetFolder, ties: Ties) -> Steps[None]:
    """Cut the ties; a private fleet is gone afterwards, files and all."""
    if not ties:
        return  # a forked copy of the process that owns it, or the second call
    supervisor = read(folder.state, Supervision)
    ties.cut()
    if not folder.is_private:
        return
    # Its supervisor has seen the lifeline's end and removes everything; or was killed, and has left that to us.
    deadline = removal = time.monotonic() + _KILL_S
    while folder.path.exists() and time.monotonic() < removal:
        if not folder.is_supervised() and not is_locked(folder.processes_lock):
            removal = min(removal, time.monotonic() + _REMOVAL_S)
        yield 0.01
    _remove(folder)
    while supervisor is not None and supervisor.is_alive() and time.monotonic() < deadline:
        yield 0.01


def _sweep() -> None:
    """Remove what private fleets left behind whose owner and supervisor were killed together."""
    base = runtime_base(os.environ)
    for path in base.glob(f"{PRIVATE_PREFIX}*") if base.is_dir() else ():
        folder = fleet_folder(path.name, os.environ)
        with contextlib.suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > _STALE_S
            is_starting = is_locked(folder.start_lock) or not (is_old or folder.supervisor_lock.exists())
            if not is_starting and not folder.is_supervised() and not is_locked(folder.processes_lock):
                _remove(folder)


def _remove(folder: FleetFolder) -> None:
    shutil.rmtree(folder.path, ignore_errors=True)
    shutil.rmtree(folder.data, ignore_errors=True)


def current_state(folder: FleetFolder) -> FleetState | None:
    is_supervised = folder.is_supervised()
    state = read(folder.state, FleetState)
    return state if state is not None and (is_supervised or state.state == "failed") else None


def _signal(folder: FleetFolder, number: signal.Signals) -> None:
    """To the supervisor, and surely to none that got its process id after it."""
    supervision = read(folder.state, Supervision)
    if supervision is None or not supervision.pid:
        return
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(supervision.pid)
        try:
            if supervision.is_alive():  # asked after the descriptor was opened: it is no other process
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _raise_failure(state: FleetState) -> None:
    if state.state != "failed" or state.error is None:
        return
    error = from_body(state.error)
    if isinstance(error, ConfigurationError | FleetUnavailable | CallerError):
        raise error
    raise FleetUnavailable(error.message, code="fleet_failed", hint=error.hint, cause=state.error.code)


def _teller(on_progress: OnProgress | None) -> OnProgress:
    last: list[FleetState] = []

    def tell(state: FleetState) -> None:
        if on_progress is not None and last != [state]:
            last[:] = [state]
            on_progress(state)

    return tell


def _check(deadline: float, folder: FleetFolder, problem: str) -> None:
    if time.monotonic() > deadline:
        raise FleetUnavailable(
            f"Local fleet {folder.name!r} keeps us waiting for too long. {problem}",
            code="no_worker" if problem.startswith("No worker") else "fleet_failed",
            hint=f"Its logs: {folder.path}",
        )


def _child_environment() -> dict[str, str]:
    """Ours, and where tokenfleet lies unless it is installed where Python looks anyway."""
    env = dict(os.environ)
    root = str(Path(next(iter(tokenfleet.__path__))).parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH", ""), root]))
    return env
