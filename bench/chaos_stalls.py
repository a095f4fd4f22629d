"""Why did a stream stand still? ``python -m bench.chaos_stalls FOLDER`` tells of a trial that was run with ``--keep``.

Per long stall: when the reader had its last token and its next one, when which worker ended and began with the job, and
whether its Celery message had to be sent again; then what the workers' logs say of the time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LONG_S, SHOWN = 2.5, 6


def main(folder: Path, long_s: float = LONG_S) -> None:
    lines = [json.loads(line) for file in folder.glob("history-*.jsonl") for line in file.open()]
    lines.sort(key=lambda line: line["t"])
    begin = lines[0]["t"]
    dumped = json.loads((folder / "dump.json").read_text()) if (folder / "dump.json").exists() else {"jobs": {}}
    for line in lines:
        if line["kind"] == "fault":
            print(f"{line['t'] - begin:7.2f}  fault: {line['what']} of {line['pid']}")
    stalls = sorted(_stalls(lines), key=lambda s: -s[1] + s[0])
    long = [stall for stall in stalls if stall[1] - stall[0] >= long_s]
    print(f"{len(stalls)} takeovers; {len(long)} took {long_s:g} s and more")
    engines = _engines(folder)
    for before, after, job, epoch in long[:SHOWN]:
        stored = dumped["jobs"].get(job, {}).get("hash", {})
        print(f"\n{after - before:.2f} s: job {job}, attempt {epoch}; message sent {stored.get('sends')} times for "
              f"{stored.get('epoch')} attempts, deaths: {stored.get('deaths', '').strip()!r}")  # fmt: skip
        told = [(before, "the reader's last token"), (after, "the reader's next token")]
        told += [(t, what) for t, name, what in engines if name.startswith(job) and before - 2 < t < after + 1]
        for t, what in sorted(told):
            print(f"  {t - begin:7.2f}  {what}")
    for log in sorted(folder.glob("worker-*.log")):
        for text in log.read_text(errors="replace").splitlines():
            if any(word in text for word in ("sent again", "requeued", "lapsed", "given back", "heartbeat", "ERROR")):
                print(f"{log.stem}: {text[:160]}")


def _stalls(lines: list[dict[str, Any]]) -> list[tuple[float, float, str, int]]:
    """(last delta before a takeover, first one after it, job, epoch), by one reader."""
    last: dict[str, float] = {}
    taken: dict[str, int] = {}
    found = []
    for line in lines:
        if line["kind"] != "event":
            continue
        key, event, t = line["job"], line["event"], line["t"]
        if event["type"] == "started" and event["epoch"] > 1 and key in last:
            taken[key] = event["epoch"]
        elif event["type"] == "delta":
            if key in taken:
                found.append((last[key], t, key, taken.pop(key)))
            last[key] = t
    return found


def _engines(folder: Path) -> list[tuple[float, str, str]]:
    """(time, sequence, what) of every begin and end in the engines' own records."""
    found = []
    for file in sorted(folder.glob("record-*.jsonl")):
        for text in file.read_text().splitlines():
            if not text.endswith("}") or (line := json.loads(text))["event"] not in ("prefill", "end"):
                continue
            what = "begins" if line["event"] == "prefill" else f"ends ({line['reason']})"
            found.append((line["t"], line["sequence_id"], f"{file.stem} {what}"))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:3]))
