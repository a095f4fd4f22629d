"""The rows of a chaos run, and how they get into docs/reliability.md."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

BEGIN, END = "<!-- chaos: written by bench/chaos.py -->", "<!-- end of chaos -->"


MOST_GAPS = 5000
"""Kept of the times between tokens, by chance: a long run has millions."""


@dataclass
class Row:
    """One trial, or several seeds of it. ``chances``: how often something could have gone wrong (streams x faults)."""

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
    command: str = ""
    seeds: int = 1

    def __post_init__(self) -> None:
        for gaps in (self.before_ms, self.after_ms):
            if len(gaps) > MOST_GAPS:
                gaps[:] = random.Random(0).sample(gaps, MOST_GAPS)

    def cells(self) -> list[str]:
        bound = "" if self.violations or not self.chances else f" (< {100 * 3 / self.chances:.2g} %)"
        return [
            self.name + (f" ({self.seeds} seeds)" if self.seeds > 1 else ""),
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


def merged(rows: list[Row]) -> list[Row]:
    """The seeds of each trial as one row."""
    trials: dict[tuple[str, str], Row] = {}
    for row in rows:
        if (whole := trials.get((row.name, row.command))) is None:
            trials[row.name, row.command] = Row(**asdict(row))
            continue
        for name in ("chances", "streams", "failed", "violations", "tokens", "seeds"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        for name in ("stalls_s", "recoveries_s", "before_ms", "after_ms"):
            getattr(whole, name).extend(getattr(row, name))
        whole.notes = "; ".join(dict.fromkeys(note for note in (whole.notes, row.notes) if note))
    return list(trials.values())


def table(rows: list[Row]) -> str:
    head = [
        "trial", "stream × fault", "success / failed", "violations (95 % upper bound)", "stall p50 / p99",
        "recovery p50 / max", "between tokens p50 / p99, before → after", "",
    ]  # fmt: skip
    whole = merged(rows)
    lines = [head, ["---"] * len(head), *(row.cells() for row in whole)]
    commands = "\n".join(f"- {row.name}: `{row.command}`" for row in whole)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\nTo run them again:\n\n{commands}"


def keep(file: Path, entry: Row | str) -> None:
    """Append a trial's row, or the leak run's paragraph, to a file of results: a long run may be made in pieces."""
    with file.open("a") as results:
        results.write(json.dumps({"text": entry} if isinstance(entry, str) else asdict(entry)) + "\n")


def kept(file: Path) -> tuple[list[Row], list[str]]:
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    texts = [entry["text"] for entry in entries if "text" in entry]
    return [Row(**entry) for entry in entries if "text" not in entry], texts


def write_table(document: Path, rows: list[Row], texts: list[str], machine: str) -> None:
    """Replace what stands between the marks, or add it at the end."""
    text = document.read_text()
    body = f"""{BEGIN}
{machine}, every process on the same machine.

{table(rows)}

{(chr(10) * 2).join(texts)}
{END}"""
    if BEGIN in text:
        head, _, rest = text.partition(BEGIN)
        document.write_text(head + body + rest.partition(END)[2])
    else:
        document.write_text(f"{text.rstrip()}\n\n## Figures\n\n{body}\n")
