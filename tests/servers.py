"""Real servers for tests: a Valkey of one's own on its own unix socket, with password, AOF and noeviction.

`redis_server` is fresh for each test and may be killed, paused, restarted. `shared_redis` is one server for the whole
session, for tests that only need *a* Redis: each gets a fleet name of its own, so their keys never meet. Neither
outlives pytest, however pytest dies. ``pytest_plugins`` or ``conftest.py`` makes them known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tokenfleet.wire.urls import to_celery
from tokenfleet.workers.embedded_server import EmbeddedServer


def new_fleet_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@dataclass
class RedisServer:
    """``url`` is redis-py's form, ``celery_url`` Celery's; ``fleet`` is a name no other test uses."""

    server: EmbeddedServer
    fleet: str

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def celery_url(self) -> str:
        return to_celery(self.server.url)

    @property
    def pid(self) -> int:
        return self.server.pid

    def client(self, **options: Any) -> redis.Redis:
        return self.server.client(**options)

    def kill9(self) -> None:
        """SIGKILL the server process itself; returns when it is gone. Data stays on disk."""
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.kill()

    def restart(self, *, empty: bool = False) -> None:
        """A new process on the same socket with the same password (after `kill9`, or stopping the old one first).

        ``empty=True`` loses all data, as a Redis without persistence does.
        """
        self.server.stop()
        if empty:
            shutil.rmtree(self.server.data_folder / "appendonlydir", ignore_errors=True)
        self.server.start()

    @contextlib.contextmanager
    def stop_cont(self) -> Iterator[None]:
        """Frozen (SIGSTOP) within the block: it accepts connections and answers nothing. Then it goes on."""
        pid = self.server.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def running_server(**settings: str) -> Iterator[EmbeddedServer]:
    """``settings`` override the server's configuration, ``_`` standing for ``-`` (``maxmemory="10mb"``)."""
    # Not tmp_path: its names can outgrow the 107 bytes of a socket's path.
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        server = EmbeddedServer(
            Path(folder), settings={name.replace("_", "-"): text for name, text in settings.items()}
        )
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server for this test alone."""
    with running_server() as server:
        yield RedisServer(server, new_fleet_name())


@pytest.fixture(scope="session")
def _session_server() -> Iterator[EmbeddedServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def shared_redis(_session_server: EmbeddedServer) -> RedisServer:
    """One server for all tests, a fleet name for each. Don't kill it, don't FLUSHALL it."""
    return RedisServer(_session_server, new_fleet_name())
