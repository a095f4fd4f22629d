"""The files of a local fleet: what its clients, its supervisor and its workers tell one another, and where.

| file in the runtime folder | what                                                          | writer             |
|----------------------------|---------------------------------------------------------------|--------------------|
| start.lock                 | held while a client looks for the fleet or starts it          | client             |
| users.lock                 | held, shared, by each attached client; the kernel lets go     | client             |
| supervisor.lock            | held by the running supervisor; free means there is none      | supervisor         |
| processes.lock             | held by all of the fleet's processes; free means none is left | supervisor         |
| config.json                | `LocalFleetConfig` of the running fleet                       | client, at start   |
| fleet.json                 | `FleetState`, replaced as a whole at every change             | supervisor         |
| worker.json                | settings of the workers (``TOKENFLEET_CONFIG``)               | supervisor         |
| worker-N.json              | `WorkerReport` of worker N (``TOKENFLEET_STATE_FILE``)        | worker N           |
| redis.sock, redis.conf     | the server's socket (0700) and settings                       | embedded server    |
| *.log, *.log.1             | output of supervisor, Redis and workers                       | each               |

All of them are readable by their owner only, and so is the folder. The data folder holds ``appendonlydir`` and
``password``; of a persistent fleet it stays when the fleet stops.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from tokenfleet.wire.errors import ConfigurationError, ErrorBody
from tokenfleet.wire.private_files import is_locked

PRIVATE_PREFIX = ".private-"  # a name that nobody can ask for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


class LocalFleetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to run a local fleet. ``worker`` is passed to the workers as it is: their settings, as a JSON object."""

    worker: dict[str, Any] = {}
    workers: int = 1
    gpus: tuple[str, ...] | None = None
    """Split evenly among the workers; None leaves CUDA_VISIBLE_DEVICES as it is, () hides all GPUs."""
    persistent: bool = True
    """Keep the data when the fleet stops. A private fleet never does."""
    idle_stop_s: float | None = 600.0
    """Stop this long after the last client left and the last job ended; None: only when told to."""
    stop_grace_s: float = 40.0
    """How long workers may take to finish or hand over their jobs when the fleet stops."""
    start_attempts: int = 3
    """How often in a row a worker may die before it was ready."""
    command: tuple[str, ...] = ()
    """What to run as a worker, instead of tokenfleet's own; ``{index}`` and ``{name}`` are replaced."""
    redis_settings: dict[str, str] = {}
    cwd: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 1024:
            raise ConfigurationError(f"workers={self.workers} is out of range.", hint="Use 0 to 1024.")
        if self.gpus and (self.workers == 0 or len(self.gpus) % self.workers):
            raise ConfigurationError(
                f"{len(self.gpus)} GPUs can't be split evenly among {self.workers} workers.",
                hint="Give each worker the same number; name a GPU twice to share it.",
            )
        if self.start_attempts < 1:
            raise ConfigurationError("start_attempts must be at least 1.")
        if not all(seconds is None or seconds >= 0 for seconds in (self.idle_stop_s, self.stop_grace_s)):
            raise ConfigurationError("idle_stop_s and stop_grace_s can't be negative.")

    def visible_gpus(self, index: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of one worker; None to leave it alone."""
        if self.gpus is None:
            return None
        each = len(self.gpus) // self.workers
        return ",".join(self.gpus[index * each : (index + 1) * each])

    def serves_as(self, other: LocalFleetConfig) -> bool:
        """Whether a client that wants ``other`` is well served by a fleet that runs with this."""
        mine, its = ((c.worker, c.workers, c.gpus, c.command, c.persistent) for c in (self, other))
        return mine == its


class WorkerReport(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a worker says of itself. ``progress`` is of the current step, 0 to 1; ``error`` comes with ``failed``."""

    state: Literal["loading", "ready", "failed"]
    detail: str = ""
    progress: float | None = None
    models: tuple[str, ...] = ()
    is_busy: bool = False
    """Jobs are running: the fleet is not idle, though no client be attached."""
    error: ErrorBody | None = None


WorkerPhase = Literal["waiting", "starting", "loading", "ready", "restarting", "failed", "stopped"]


class WorkerState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One worker as the supervisor sees it. ``pid`` is the worker's own, and its process group's."""

    index: int
    state: WorkerPhase
    pid: int = 0
    restarts: int = 0
    detail: str = ""
    progress: float | None = None
    models: tuple[str, ...] = ()
    error: ErrorBody | None = None


class Supervision(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The part of fleet.json that every release can read: who supervises, and of which release it is.

    ``boot`` is the supervisor's start time in clock ticks: with ``pid`` it names a process for ever."""

    version: str
    pid: int
    boot: int

    def is_alive(self) -> bool:
        return self.boot != 0 and boot_ticks(self.pid) == self.boot


class FleetState(Supervision, frozen=True, omit_defaults=True, kw_only=True):
    """A fleet as its supervisor sees it. It is ``ready`` when one of its workers is (or it is to have none)."""

    state: Literal["starting", "loading", "ready", "failed", "stopping"]
    name: str
    url: str = ""
    media_folder: str = ""
    """Where media too large for Redis lie: for workers and clients."""
    redis_pid: int = 0
    detail: str = ""
    progress: float | None = None
    workers: tuple[WorkerState, ...] = ()
    error: ErrorBody | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """What the ready workers serve."""
        served = (model for worker in self.workers if worker.state == "ready" for model in worker.models)
        return tuple(dict.fromkeys(served))


@dataclass(frozen=True, slots=True)
class FleetFolder:
    """The runtime folder of one fleet, and the folder of its data."""

    name: str
    path: Path
    data: Path

    @property
    def is_private(self) -> bool:
        return self.name.startswith(PRIVATE_PREFIX)

    @property
    def fleet(self) -> str:
        """The fleet's name in Redis. A private fleet has a Redis of its own, and so needs no name of its own."""
        return "private" if self.is_private else self.name

    @property
    def start_lock(self) -> Path:
        return self.path / "start.lock"

    @property
    def users_lock(self) -> Path:
        return self.path / "users.lock"

    @property
    def supervisor_lock(self) -> Path:
        return self.path / "supervisor.lock"

    @property
    def processes_lock(self) -> Path:
        return self.path / "processes.lock"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def state(self) -> Path:
        return self.path / "fleet.json"

    @property
    def worker_settings(self) -> Path:
        return self.path / "worker.json"

    @property
    def supervisor_log(self) -> Path:
        return self.path / "supervisor.log"

    def worker_report(self, index: int) -> Path:
        return self.path / f"worker-{index}.json"

    def worker_log(self, index: int) -> Path:
        return self.path / f"worker-{index}.log"

    def is_supervised(self) -> bool:
        """Whether its supervisor lives. The probe holds the lock for an instant: a starting supervisor tries again."""
        return is_locked(self.supervisor_lock)


def fleet_folder(name: str, env: Mapping[str, str], *, persistent: bool = True) -> FleetFolder:
    """The folders of fleet ``name``; nothing is made. Raises `ConfigurationError` for a bad name."""
    is_private = name.startswith(PRIVATE_PREFIX)
    if not is_private and not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name[:60]!r} can't be a fleet's name.", hint="Use 1 to 40 letters, digits, '_', '.' or '-'."
        )
    data = state_base(env) if persistent and not is_private else _temp_base(env) / "data"
    return FleetFolder(name, runtime_base(env) / name, data / name)


def runtime_base(env: Mapping[str, str]) -> Path:
    """``$XDG_RUNTIME_DIR/tokenfleet``, or a folder of this user's under the temporary one where that is not usable."""
    given = Path(env.get("XDG_RUNTIME_DIR", ""))
    # After su or sudo it names another user's folder.
    if given.is_absolute() and given.is_dir() and given.stat().st_uid == os.getuid() and os.access(given, os.W_OK):
        return given / "tokenfleet"
    return _temp_base(env) / "run"


def state_base(env: Mapping[str, str]) -> Path:
    """``$XDG_STATE_HOME/tokenfleet``, by default ``~/.local/state/tokenfleet``."""
    given = Path(env.get("XDG_STATE_HOME", ""))
    return (given if given.is_absolute() else Path(env.get("HOME") or Path.home()) / ".local/state") / "tokenfleet"


def _temp_base(env: Mapping[str, str]) -> Path:
    return Path(env.get("TMPDIR") or tempfile.gettempdir()) / f"tokenfleet-{os.getuid()}"


def boot_ticks(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since the machine's start; 0 if there is none, or a zombie of it."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    return 0
