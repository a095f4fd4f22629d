"""Readers' histories: each saw every event once, in order, and all saw the same (I2, I4), and each came to an end (I1).

Codes: seq_gap, seq_repeat, token_gap, token_repeat, changed_event, event_after_terminal, two_terminals,
missing_terminal, other_text_than_stored, told_otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults.checker.evidence import TERMINALS, Evidence, Line
from tests.faults.checker.ledger import Log

if TYPE_CHECKING:
    from tests.faults.checker.verdict import Verdict


@dataclass
class Reading:
    """From an ``open`` on."""

    by: str
    job: str
    cursor: int
    after: int
    opened_t: float
    is_over: bool = False
    ended: str = ""
    times: list[float] = field(default_factory=list)
    """When it got deltas."""
    indices: dict[int, int] = field(default_factory=dict)


def check(evidence: Evidence, verdict: Verdict, logs: dict[str, Log]) -> None:
    first_seen: dict[tuple[str, int], tuple[str, Line]] = {}
    readings: dict[tuple[str, str], Reading] = {}
    over: list[Reading] = []
    for line in evidence.history:
        if line["kind"] == "open":
            key = (line["by"], line["job"])
            if key in readings:
                over.append(readings[key])
            readings[key] = Reading(line["by"], line["job"], line["after"], line["after"], line["t"])
        elif line["kind"] in ("event", "error", "left"):
            reading = readings[line["by"], line["job"]]
            if line["kind"] == "event":
                _event(line, reading, verdict, first_seen, logs)
            else:
                reading.is_over = True
                reading.ended = reading.ended or line.get("code", "left")
    over += readings.values()
    for reading in over:
        if not reading.is_over:
            verdict.found("I1", "missing_terminal", reading.job, f"{reading.by} was left without an end")
        elif (log := logs.get(reading.job)) and reading.ended == "unknown_job":
            verdict.found(
                "I1", "told_otherwise", reading.job, f"{reading.by} was told {reading.ended}; it exists: {log[-1]}"
            )
    for job in {reading.job for reading in over if cut(logs.get(reading.job, []))}:
        pauses = [
            max((b - a for a, b in zip(r.times, r.times[1:], strict=False)), default=0.0)
            for r in over if r.job == job and r.after == 0
        ]  # fmt: skip
        verdict.stalls_s.append(max(pauses, default=0.0))


def _event(
    line: Line,
    reading: Reading,
    verdict: Verdict,
    first_seen: dict[tuple[str, int], tuple[str, Line]],
    logs: dict[str, Log],
) -> None:
    job, seq, event = line["job"], line["seq"], line["event"]

    def found(invariant: str, code: str, detail: str = "") -> None:
        verdict.found(invariant, code, job, f"{reading.by}, event {seq}: {detail}")

    if reading.ended:
        found("I4", "two_terminals" if event["type"] in TERMINALS else "event_after_terminal", event["type"])
    if seq > reading.cursor + 1:
        found("I2", "seq_gap", f"after {reading.cursor}")
    elif seq <= reading.cursor:
        found("I2", "seq_repeat", f"after {reading.cursor}")
    reading.cursor = seq
    by, same = first_seen.setdefault((job, seq), (reading.by, event))
    if same != event:
        found("I2", "changed_event", f"{by} saw {same}, now {event}"[:300])
    log = logs.get(job)
    if log is not None and (seq > len(log) or bare(log[seq - 1]) != bare(event)):
        found("I3", "other_text_than_stored", str(event)[:200])
    if event["type"] == "delta":
        reading.times.append(line["t"])
        choice = event["choice"]
        if reading.after == 0 or choice in reading.indices:
            expected = reading.indices.get(choice, 0)
            if event["index"] != expected:
                found(
                    "I2", "token_gap" if event["index"] > expected else "token_repeat", f"choice {choice}: {expected}"
                )
        reading.indices[choice] = event["index"] + len(event["ids"])
    elif event["type"] in TERMINALS:
        reading.is_over = True
        reading.ended = reading.ended or event["type"]


def bare(value: Any) -> Any:
    """Without what means the same as being left out: clients may write down an event with or without its defaults."""
    if isinstance(value, dict):
        pairs = ((k, bare(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v not in (0, "", None, [], {}) and (k, v) != ("attempts", 1)}
    return [bare(each) for each in value] if isinstance(value, list) else value


def cut(log: Log) -> bool:
    """Whether tokens were delivered before and after a change of attempts."""
    seen = False
    for k, event in enumerate(log):
        seen = seen or event["type"] == "delta"
        if seen and event["type"] == "started" and any(e["type"] == "delta" for e in log[k:]):
            return True
    return False
