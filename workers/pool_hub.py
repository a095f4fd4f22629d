"""Hands calls from other threads to the thread of Celery's hub (the main thread of a worker).

Celery's requests, its table of active tasks, the event dispatcher and kombu's channel (acks!) belong to the hub's
thread. A pool that touches them from elsewhere races with `inspect active` and with the broker socket, so everything
the loop's thread has to tell Celery goes through here.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class HubMailbox:
    """Calls left by any thread, made in order on the hub's thread.

    An own socket pair instead of ``hub.call_soon``: what a ``call_soon`` callback itself schedules (the ack, after a
    result) waits until the hub's *next* poll ends, up to a second on an idle worker; what a reader schedules is done
    right after it. Until a hub is registered (a transport without asynchronous I/O has none) calls are made at once,
    in the caller's thread, as Celery's thread pool does.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_awake = False
        self._hub: Any = None
        self._is_hub_broken = False

    def register(self, hub: Any) -> None:
        """Called at every (re)connect: a lost connection makes Celery drop all readers of its hub."""
        if self._hub is None:
            self._reader, self._writer = socket.socketpair()
            self._reader.setblocking(False)
            self._writer.setblocking(False)
        self._hub = hub
        hub.add_reader(self._reader.fileno(), self.drain)

    def post(self, call: Callable[..., object], *args: Any) -> None:
        """Safe in any thread and in a signal handler (no lock is taken)."""
        if self._hub is None:
            self._make(call, args)
            return
        self._calls.append((call, args))
        if not self._is_awake:  # a stale False only costs one byte more; see drain() for why a stale True can't hurt
            self._is_awake = True
            self.wake()

    def wake(self) -> None:
        """End the hub's current poll."""
        if self._hub is None:
            return
        with contextlib.suppress(OSError):  # full: the hub is about to wake anyway
            self._writer.send(b"\0")

    def drain(self) -> None:
        with contextlib.suppress(OSError):
            self._reader.recv(4096)
        self._is_awake = False  # before looking: a call appended after the last look must send its own byte
        while self._calls:
            self._make(*self._calls.popleft())

    def turn(self, wait_s: float) -> None:
        """Drain once, while the hub itself isn't running (shutdown); returns after ``wait_s`` if nothing came.

        The hub gets its turn too, so that acks and timers (lease refreshes) of a long drain aren't kept until its end.
        """
        if self._hub is None:
            time.sleep(min(wait_s, 0.05))
        elif self._is_hub_broken:
            select.select([self._reader], [], [], wait_s)
            self.drain()
        else:
            entry = self._hub.call_later(wait_s, self.wake)  # bounds the poll: it may otherwise last ten seconds
            try:
                self._hub.run_once()
            except Exception as exc:  # noqa: BLE001  the broker went away; unacked work will be delivered again
                logger.warning("Celery's hub failed during the shutdown (%r): going on without it", exc)
                self._is_hub_broken = True
            finally:
                entry.cancel()
            self.drain()  # a lost connection took our reader from the hub, and nobody reconnects any more

    def close(self) -> None:
        if self._hub is not None:
            self._reader.close()
            self._writer.close()

    def _make(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            call(*args)
        except Exception:  # one task's callback must not end the worker
            logger.exception("A callback of Celery failed: %r", call)
