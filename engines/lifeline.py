"""An engine's child process outlives a parent that was killed, and its GPU memory with it. Ours does not."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def leave_with_parent() -> None:
    """In a process that multiprocessing spawned: exit at once when the parent is gone, however it went.

    Waits for the end of a pipe: a parent-death signal comes already when the thread that started us ends.
    Does nothing in a process of another kind."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
