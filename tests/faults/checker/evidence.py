"""What a run left behind, as plain dicts.

History lines (``t`` is monotonic seconds of the machine, ``by`` the reader):
    {"kind": "accepted", "t", "job", "n", "max_new_tokens"}     {"kind": "refused", "t", "code"}
    {"kind": "open", "t", "by", "job", "after"}                 a reader begins after this seq
    {"kind": "event", "t", "by", "job", "seq", "event"}         in the order in which it got them
    {"kind": "error", "t", "by", "job", "code"}                 its stream ended with a typed error
    {"kind": "left", "t", "by", "job"}                          it left early, by itself
    {"kind": "fault", "t", "what", "pid", "cuts"}               ``cuts``: it must land in the middle of streams
Dump: {"prefix", "jobs": {id: {"hash": {…}, "log": [[id, event text], …], "ttl_ms", "log_ttl_ms", "celery"}},
       "keys": {name: ttl_ms}}     celery: what AsyncResult reads, text or null. ttl -1: never expires.
Records: engines/scripted/record.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]
TERMINALS = ("finished", "failed", "cancelled", "expired")


@dataclass
class Evidence:
    history: list[Line] = field(default_factory=list)
    records: list[Line] = field(default_factory=list)
    dump: dict[str, Any] = field(default_factory=lambda: {"prefix": "", "jobs": {}, "keys": {}})

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        history = [line for path in sorted(folder.glob("history-*.jsonl")) for line in lines_of(path)]
        records = [line for path in sorted(folder.glob("record-*.jsonl")) for line in lines_of(path)]
        history.sort(key=lambda line: line["t"])  # stable: one reader's lines keep their order
        return cls(history, records, json.loads((folder / "dump.json").read_text()))

    def of_kind(self, kind: str) -> Iterator[Line]:
        return (line for line in self.history if line["kind"] == kind)


def lines_of(path: Path) -> list[Line]:
    """A last line that its writer did not live to end is no line."""
    text = path.read_text(errors="surrogateescape")
    return [json.loads(line) for line in text.split("\n")[:-1] if line]
