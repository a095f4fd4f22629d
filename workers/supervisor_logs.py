"""Logs of processes that write to a file of their own, for as long as they like."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

LIMIT_BYTES = 8 * 1024 * 1024  # twice that per process: the runtime folder usually lies in memory


def rotate(log: Path, limit_bytes: int = LIMIT_BYTES) -> bool:
    """Move a log that has grown too long to ``.1`` (replacing that one) and begin it anew; whether it was.

    By copy and cut, since its writer keeps the file open. Writers append, so they go on at the new end; what is written
    between copy and cut is lost.
    """
    try:
        if log.stat().st_size <= limit_bytes:
            return False
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
    except FileNotFoundError:
        return False
    return True
