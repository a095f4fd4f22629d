"""Watching real processes: alive or gone, and waiting for either with a deadline."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

AsyncTest = Callable[..., Awaitable[None]]


def is_alive(pid: int) -> bool:
    """A zombie is gone: nobody but its parent has anything to do with it any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def on_this_machine(limit_s: float) -> float:
    """``limit_s`` of a machine that is free; more on one that is busy, by its load average: what is limited waits for
    its turn there as long."""
    return limit_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def free_port() -> int:
    """For a server that is about to start. Below the ports that connections are given: until it listens nobody's
    connection can take it, nor be made to itself."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Standstill:
    """How long this machine has kept a thread of this process from its turn since this was made: no fault of what is
    timed meanwhile, which had to wait as long."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        at = time.monotonic()
        while not self._is_over.wait(0.01):
            self._lost_s += max(0.0, time.monotonic() - at - 0.03)
            at = time.monotonic()

    @property
    def lost_s(self) -> float:
        """So far; turns that came within 20 ms are not counted."""
        return self._lost_s

    def end(self) -> float:
        """Seconds in all."""
        self._is_over.set()
        self._thread.join()
        return self._lost_s


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "") -> Any:
    """Poll until ``condition()`` is true; its value. Fails after ``timeout_s``: of `on_this_machine`, and of time in
    which it did not stand still."""
    if value := condition():
        return value
    started, stalls = time.monotonic(), Standstill()
    try:
        while not (value := condition()):
            waited_s = time.monotonic() - started - stalls.lost_s
            assert waited_s < on_this_machine(timeout_s), f"not within {timeout_s:g} s: {what or condition}"
            time.sleep(0.01)
        return value
    finally:
        stalls.end()


def in_time(measured_s: Callable[[], float], limit_s: float, tries: int = 3) -> None:
    """``measured_s()`` is less than ``limit_s`` (`on_this_machine`): once, where a machine that stands still at the
    wrong moment may take longer."""
    took: list[float] = []
    while not took or took[-1] >= on_this_machine(limit_s):
        assert len(took) < tries, f"it took {took} s each time, not {limit_s:g}"
        took.append(measured_s())


def once_in(tries: int) -> Callable[[AsyncTest], AsyncTest]:
    """An async test that counts what an engine does between two of its own lines, where the machine may stand still:
    it holds if it does once."""

    def decorate(test: AsyncTest) -> AsyncTest:
        @functools.wraps(test)
        async def run(*args: Any, **named: Any) -> None:
            for left in reversed(range(tries)):
                try:
                    await test(*args, **named)
                except AssertionError:
                    if not left:
                        raise
                else:
                    return

        return run

    return decorate


def throughout(condition: Callable[[], object], for_s: float) -> None:
    """Poll for ``for_s``; fails as soon as ``condition()`` is false."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert condition()
        time.sleep(0.01)


def all_gone(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)
