"""A fleet on this machine: found, or started, attached to, watched and stopped.

The first client starts a detached supervisor (a child process, never an import: `tokenfleet.workers.supervisor`), which
owns Redis and workers; others attach to it. `tokenfleet.wire.local_files` has the files by which they talk.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from tokenfleet.producer.local_fleet_steps import (
    OnProgress,
    Ties,
    current_state,
    down_steps,
    drive,
    drive_async,
    ensure_steps,
    leave_steps,
    ready_steps,
)
from tokenfleet.wire.local_files import FleetFolder, FleetState, LocalFleetConfig, fleet_folder, runtime_base
from tokenfleet.wire.media import MediaSettings


class LocalFleet:
    """An attachment to a local fleet; made by `ensure`. The fleet stays up at least as long as this object is open.

    As a context manager it closes itself: a private fleet ends, a shared one goes on for others.
    """

    def __init__(self, folder: FleetFolder, url: str, ties: Ties) -> None:
        self.name = folder.name
        self.url = url
        """Of its Redis, in redis-py's form, with the password."""
        self.fleet = folder.fleet
        """The fleet's name in Redis."""
        self._folder = folder
        self._ties = ties
        # Also at the interpreter's end, and then it waits: a private fleet leaves neither process nor file.
        self._finalizer = weakref.finalize(self, _leave, folder, ties)

    @property
    def is_private(self) -> bool:
        return self._folder.is_private

    @property
    def models(self) -> tuple[str, ...]:
        """What its ready workers serve."""
        state = self.state()
        return state.models if state else ()

    @property
    def media(self) -> MediaSettings:
        """For clients: with the folder that its workers look into."""
        state = self.state()
        return MediaSettings(folder=Path(state.media_folder) if state and state.media_folder else None)

    def state(self) -> FleetState | None:
        """As its supervisor last told; None if there is no supervisor any more, unless the fleet failed."""
        return current_state(self._folder)

    def wait_ready(self, timeout_s: float | None = 600.0, on_progress: OnProgress | None = None) -> FleetState:
        """Wait until a worker can take jobs; ``timeout_s=None`` waits for as long as it takes to load or to fail.

        ``on_progress`` gets the state at each change (``detail``, ``progress``).

        Raises the workers' own error as soon as they gave up: `ConfigurationError`, or `FleetUnavailable` for all else.
        """
        return drive(ready_steps(self._folder, timeout_s, on_progress))

    async def wait_ready_async(
        self, timeout_s: float | None = 600.0, on_progress: OnProgress | None = None
    ) -> FleetState:
        return await drive_async(ready_steps(self._folder, timeout_s, on_progress))

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the fleet, for all its clients. Returns when no process of it is left."""
        try:
            drive(down_steps(self._folder, timeout_s))
        finally:
            self.close()

    async def stop_async(self, timeout_s: float = 60.0) -> None:
        try:
            await drive_async(down_steps(self._folder, timeout_s))
        finally:
            await self.close_async()

    def close(self) -> None:
        """Leave it. May be called again."""
        self._finalizer()

    async def close_async(self) -> None:
        await drive_async(leave_steps(self._folder, self._ties))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close_async()


def ensure(
    name: str = "default",
    config: LocalFleetConfig | None = None,
    *,
    private: bool = False,
    on_progress: OnProgress | None = None,
    timeout_s: float = 60.0,
) -> LocalFleet:
    """Attach to local fleet ``name``, starting it if it doesn't run. Returns when its Redis serves; see `wait_ready`.

    Without ``config`` any running fleet will do. ``private`` starts one that nobody else can find and that ends with
    this process, however it ends; ``name`` is then ignored.

    Raises `ConfigurationError` (not Linux, no server to run, running with other settings or as another release) and
    `FleetUnavailable`.
    """
    return LocalFleet(*drive(ensure_steps(name, config, private, on_progress, timeout_s)))


async def ensure_async(
    name: str = "default",
    config: LocalFleetConfig | None = None,
    *,
    private: bool = False,
    on_progress: OnProgress | None = None,
    timeout_s: float = 60.0,
) -> LocalFleet:
    """As `ensure`. When cancelled, nothing stays behind but, perhaps, a fleet without clients."""
    return LocalFleet(*await drive_async(ensure_steps(name, config, private, on_progress, timeout_s)))


def down(name: str = "default", timeout_s: float = 60.0) -> bool:
    """Stop local fleet ``name`` whoever uses it; whether one ran. Its data stays."""
    return drive(down_steps(fleet_folder(name, os.environ), timeout_s))


def status(name: str = "default") -> FleetState | None:
    """The state of local fleet ``name``; None if it doesn't run. One that failed stays known till the next start."""
    return current_state(fleet_folder(name, os.environ))


def running() -> tuple[FleetState, ...]:
    """All of this user's local fleets but private ones."""
    base = runtime_base(os.environ)
    names = sorted(path.name for path in base.iterdir()) if base.is_dir() else []
    states = (status(name) for name in names if not name.startswith("."))
    return tuple(state for state in states if state is not None)


def _leave(folder: FleetFolder, ties: Ties) -> None:
    drive(leave_steps(folder, ties))
