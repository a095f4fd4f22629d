"""Watching real processes: alive or gone, and waiting for either with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


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


def eventually(condition: Callable[[], object], within_s: float = 20.0, what: str = "") -> None:
    """Poll until ``condition()`` is true; fails after ``within_s`` (`on_this_machine`)."""
    started = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started
        assert waited_s < on_this_machine(within_s), f"not within {within_s:g} s: {what or condition}"
        time.sleep(0.01)


def throughout(condition: Callable[[], object], for_s: float) -> None:
    """Poll for ``for_s``; fails as soon as ``condition()`` is false."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert condition()
        time.sleep(0.01)


def all_gone(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)
