"""Watching real processes: alive or gone, and waiting for either with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def is_alive(pid: int) -> bool:
    """A zombie is gone: nobody but its parent has anything to do with it any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], object], within_s: float = 20.0, what: str = "") -> None:
    """Poll until ``condition()`` is true; fails after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what or condition}"
        time.sleep(0.01)


def throughout(condition: Callable[[], object], for_s: float) -> None:
    """Poll for ``for_s``; fails as soon as ``condition()`` is false."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert condition()
        time.sleep(0.01)


def all_gone(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)
