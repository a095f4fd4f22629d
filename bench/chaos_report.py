"""The rows of a chaos run, and how they get into docs/reliability.md."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- chaos: written by bench/chaos.py -->", "<!-- end of chaos -->"


@dataclass
class Row:
    """One trial. ``chances``: how often something could have gone wrong (streams x faults)."""

    name: str
    chances: int
    streams: int
    failed: int
    violations: int
    stalls_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    before_ms: list[float] = field(default_factory=list)
    after_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    notes: str = ""

    def cells(self) -> list[str]:
        bound = "" if self.violations or not self.chances else f" (< {100 * 3 / self.chances:.2g} %)"
        return [
            self.name,
            f"{self.chances:,}",
            f"{self.streams - self.failed} / {self.failed}",
            f"{self.violations}{bound}",
            pair(self.stalls_s, "s", 2),
            pair(self.recoveries_s, "s", 2, worst=True),
            f"{pair(self.before_ms, 'ms', 0)} → {pair(self.after_ms, 'ms', 0)}",
            self.notes,
        ]

    def line(self) -> str:
        return " | ".join(self.cells())


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def pair(values: list[float], unit: str, digits: int, *, worst: bool = False) -> str:
    if not values:
        return "–"
    high = max(values) if worst else percentile(values, 99)
    return f"{percentile(values, 50):.{digits}f} / {high:.{digits}f} {unit}"


def table(rows: list[Row]) -> str:
    head = [
        "trial", "stream × fault", "success / failed", "violations (95 % upper bound)", "stall p50 / p99",
        "recovery p50 / max", "between tokens p50 / p99, before → after", "",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(document: Path, rows: list[Row], leaks: str, command: str, machine: str) -> None:
    """Replace what stands between the marks, or add it at the end."""
    text = document.read_text()
    body = f"""{BEGIN}
`{command}`, {time.strftime("%Y-%m-%d", time.gmtime())}, {machine}, every process on the same machine.

{table(rows)}

{leaks}
{END}"""
    if BEGIN in text:
        head, _, rest = text.partition(BEGIN)
        document.write_text(head + body + rest.partition(END)[2])
    else:
        document.write_text(f"{text.rstrip()}\n\n## Figures\n\n{body}\n")
