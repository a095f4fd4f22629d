"""What a scripted engine did, for checkers: append-only, one JSON object a line, written before it is delivered.

    {"event": "start", "pid", "label"}
    {"event": "prefill", "sequence_id", "salt", "seed", "prompt_tokens", "delivered_tokens"}
    {"event": "tokens", "made": [[sequence_id, index, id, salt], ...]}    one line a step, all sequences
    {"event": "end", "sequence_id", "reason", "tokens"}                   stop, length, abort, error; tokens in all
    {"event": "fault", "sequence_id", "kind", "index"}

Each has ``t`` (monotonic seconds), ``wall`` (seconds since 1970) and ``pid``. ``salt`` is null unless salted.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class Record:
    """Lines go out with one ``write`` to a file opened for appending: whole, in order, safe from SIGKILL of the writer,
    and from several writers."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._pid = os.getpid()

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "t": time.monotonic(), "wall": time.time(), "pid": self._pid, **fields}
        os.write(self._file, _encode(line) + b"\n")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_record(path: str | Path) -> list[dict[str, Any]]:
    """All lines, in the order they were written."""
    return [msgspec.json.decode(line) for line in Path(path).read_bytes().splitlines()]
