"""The lease: a small thread tells Redis once a beat that this worker is alive, and does the housekeeping.

A thread of its own with a connection of its own, so that a long prefill or a busy event loop costs no lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import redis
from redis.exceptions import RedisError

from tokenfleet.wire import scripts
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.workers.guardian import Guardian
from tokenfleet.workers.settings import LeaseSettings

log = logging.getLogger(__name__)


class LeaseHolder(Protocol):
    """What the lease asks of the runtime; called from the lease's thread."""

    def describe(self) -> dict[str, str]:
        """What the worker says of itself in the registry."""
        ...

    def running_jobs(self) -> int: ...

    def is_progressing(self) -> bool:
        """False when the engine has hung: then the lease is given up, so that others take the jobs."""
        ...

    def fenced(self) -> None:
        """The lease lapsed: all jobs went to others."""
        ...

    def owned(self, job_ids: frozenset[str]) -> None:
        """The jobs that are really this worker's, where the counts differ."""
        ...

    def reaped(self, outbox: tuple[str, ...]) -> None:
        """Ended jobs whose Celery links are to be sent."""
        ...


class Lease:
    """``worker_id`` is fresh for every registration: a lapsed one never comes back."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        settings: LeaseSettings,
        holder: LeaseHolder,
        guardian: Guardian,
    ) -> None:
        self._guardian = guardian
        self._connect = connect
        self._keys = keys
        self._settings = settings
        self._holder = holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenfleet-lease", daemon=True)
        self.worker_id = new_id()
        self.registered = threading.Event()

    def start(self) -> None:
        """Begin; ``registered`` is set once the ledger knows this worker."""
        self._client = self._connect()
        self._thread.start()

    def stop(self) -> None:
        """Stop beating and give the lease back (what still runs goes to others at once)."""
        self._stop.set()
        self._thread.join()
        try:
            scripts.run_blocking(self._client, "bury", self._keys.prefix, self.worker_id)
        except (RedisError, OSError):
            log.info("could not give the lease back; it will lapse")
        self._client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._beat()
            except (RedisError, OSError) as error:
                log.warning("no heartbeat: %s", type(error).__name__)
            self._stop.wait(self._settings.heartbeat_s)

    def _beat(self) -> None:
        if not self._holder.is_progressing():
            log.error("the engine makes no progress: giving up the lease")
            return
        mode = "beat" if self.registered.is_set() else "register"
        says = [part for pair in self._holder.describe().items() for part in pair]
        reply = scripts.run_blocking(
            self._client, "beat", self._keys.prefix, self.worker_id, self._settings.lease_ms, mode,
            self._holder.running_jobs(), *says,
        )  # fmt: skip
        if reply[0] == b"dead":
            log.warning("the lease of worker %s lapsed; its jobs went to others", self.worker_id)
            self.registered.clear()
            self.worker_id = new_id()
            self._holder.fenced()
            self._beat()
            return
        self.registered.set()
        self._guardian.tell(self.worker_id)
        if reply[0] == b"jobs":
            self._holder.owned(frozenset(i.decode() for i in reply[1:]))
        outcome = scripts.run_blocking(self._client, "reap", self._keys.prefix)
        for count, what in zip(outcome[:4], ("requeued", "given up", "expired", "sent again"), strict=True):
            if count:
                log.warning("%d jobs %s", count, what)
        if len(outcome) > 5:
            self._holder.reaped(tuple(i.decode() for i in outcome[5:]))
