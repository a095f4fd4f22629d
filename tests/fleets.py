"""Real fleets for tests: Celery workers with the scripted engine on a Redis of the test's own.

``start_worker()`` returns when the worker says it is ready. A worker dies with pytest, however pytest dies (lifeline).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import wait_until
from tests.servers import RedisServer
from tokenfleet import Client

ROOT = Path(__file__).parent.parent
MODEL = "scripted"


@dataclass
class Worker:
    """A worker process; ``record`` is what its scripted engine did, one dict a line."""

    process: subprocess.Popen[bytes]
    log_path: Path
    record_path: Path
    lifeline: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def record(self) -> list[dict[str, Any]]:
        if not self.record_path.exists():
            return []
        lines = self.record_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def kill_group(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal the whole process group."""
        os.killpg(self.process.pid, how)

    def kill_main(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.process.pid, how)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes no job within the block, however long that takes: what is submitted there waits until after it."""
        self.kill_group(signal.SIGSTOP)
        try:
            yield
        finally:
            self.kill_group(signal.SIGCONT)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit status."""
        return self.process.wait(timeout_s)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


@dataclass
class Fleet:
    """Starts workers on one Redis and makes clients for it."""

    redis: RedisServer
    folder: Path
    workers: list[Worker] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def start_worker(self, *, wait: bool = True, env: dict[str, str] | None = None, **engine_args: Any) -> Worker:
        """``engine_args`` are the scripted engine's options; ``env`` further TOKENFLEET_* settings."""
        index = len(self.workers)
        record = self.folder / f"record-{index}.jsonl"
        # Streams that a test wants in flight must outlast a machine that stands still: they don't make up for it.
        options = {
            "record_path": str(record), "allow_faults": True, "token_ms": 5.0, "most_behind_ms": 250.0, **engine_args
        }  # fmt: skip
        settings = {
            "TOKENFLEET_REDIS_URL": self.redis.url,
            "TOKENFLEET_FLEET": self.redis.fleet,
            "TOKENFLEET_MODEL": MODEL,
            "TOKENFLEET_ENGINE": "scripted",
            "TOKENFLEET_ENGINE_ARGS": json.dumps(options),
            "TOKENFLEET_STATE_FILE": str(self.folder / f"state-{index}.json"),
        }
        log_path = self.folder / f"worker-{index}.log"
        reader, lifeline = os.pipe()
        name = f"w{index}-{self.redis.fleet}@%h"
        celery = ["-m", "celery", "-A", "tokenfleet.workers.app", "worker", "-l", "info", "-n", name]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "die_with_parent.py"), str(reader), sys.executable, *celery],
                cwd=ROOT, env={**os.environ, **settings, **(env or {})}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[reader],
            )  # fmt: skip
        os.close(reader)
        worker = Worker(process, log_path, record, lifeline)
        self.workers.append(worker)
        if wait:
            self.wait_ready(worker, index)
        return worker

    def wait_ready(self, worker: Worker, index: int, timeout_s: float = 60) -> None:
        state = self.folder / f"state-{index}.json"

        def is_ready() -> bool:
            assert worker.process.poll() is None, f"the worker exited:\n{worker.log[-3000:]}"
            return state.exists() and b'"ready"' in state.read_bytes() and " ready." in worker.log

        wait_until(is_ready, timeout_s, "a ready worker")

    def client(self, **options: Any) -> Client:
        client = Client(self.redis.url, fleet=self.redis.fleet, **options)
        self.clients.append(client)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.close_workers()

    def close_workers(self) -> None:
        """End them all; once."""
        workers, self.workers = self.workers, []
        for worker in workers:
            if worker.process.poll() is None:
                worker.kill_group(signal.SIGCONT)
                if "COVERAGE_PROCESS_CONFIG" in os.environ:  # only a process that leaves by itself tells what it ran
                    worker.kill_main(signal.SIGTERM)
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(10 if "COVERAGE_PROCESS_CONFIG" in os.environ else 0)
            with contextlib.suppress(ProcessLookupError):
                worker.kill_group(signal.SIGKILL)
            worker.process.wait()
            os.close(worker.lifeline)


@pytest.fixture
def fleet(redis_server: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    """No worker yet: start what the test needs."""
    fleet = Fleet(redis_server, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def served(_session_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet with one worker for all tests of a module that break nothing."""
    from tests.servers import new_fleet_name

    fleet = Fleet(RedisServer(_session_server, new_fleet_name()), tmp_path_factory.mktemp("fleet"))
    fleet.start_worker()
    yield fleet
    fleet.close()
