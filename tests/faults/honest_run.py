"""What an honest fleet would write down of two jobs, and its parts, for bending them."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.faults.checker import Evidence
from tests.faults.checker.attribution import digest, mix
from tests.faults.checker.vocabulary import text_of

A, B = "aaaaaaaa-0000-0000-0000-000000000001", "bbbbbbbb-0000-0000-0000-000000000002"
PROMPT = [258, 99, 100, 261, 259]


class Run:
    """Writes down what an honest fleet would: attempts that are cut, two readers that see everything."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.random = random.Random(7)
        self.t = 0.0

    def job(self, job: str, attempts: list[int], *, n: int = 1, in_flight: int = 3) -> None:
        """``attempts``: how many tokens of each choice each of them delivers."""
        log: list[dict[str, Any]] = [{"type": "queued", "t_ms": 1, "model": "m"}]
        ids: dict[int, list[int]] = {choice: [] for choice in range(n)}
        for epoch, count in enumerate(attempts, 1):
            log.append({"type": "started", "epoch": epoch, "worker": f"w{epoch}", "prompt_tokens": len(PROMPT)})
            is_last = epoch == len(attempts)
            for choice in range(n):
                self._attempt(job, epoch, choice, ids[choice], count, 0 if is_last else in_flight, log)
        for choice in range(n):
            log.append({"type": "choice_finished", "choice": choice, "reason": "length", "tokens": len(ids[choice])})
        tokens = sum(map(len, ids.values()))
        usage = {"prompt_tokens": len(PROMPT), "completion_tokens": tokens, "attempts": len(attempts)}
        log.append({"type": "finished", "usage": usage})
        choices = [{"index": choice, "text": text_of(ids[choice])} for choice in range(n)]
        self.evidence.dump["jobs"][job] = {
            "hash": {
                "state": "finished", "seq": str(len(log)), "epoch": str(len(attempts)), "strikes": "0",
                "prompt": json.dumps(PROMPT),
            },
            "log": [[f"{k}-0", json.dumps(event)] for k, event in enumerate(log, 1)],
            "celery": json.dumps({"status": "SUCCESS", "result": {"job_id": job, "choices": choices}}),
        }  # fmt: skip
        self.note("accepted", job=job, n=n, max_new_tokens=len(ids[0]))
        for by, after in (("early", 0), ("late", 4)):
            self.note("open", by=by, job=job, after=after)
            for seq, event in enumerate(log[after:], after + 1):
                self.note("event", by=by, job=job, seq=seq, event=event)
        self.note("fault", what="SIGKILL", pid=1, cuts=len(attempts) > 1)

    def _attempt(
        self, job: str, epoch: int, choice: int, ids: list[int], count: int, in_flight: int, log: list[dict[str, Any]]
    ) -> None:
        salt = self.random.getrandbits(63)
        sequence = f"{job}-{epoch:04d}-{choice:03d}"
        self._record("prefill", sequence_id=sequence, salt=salt, delivered_tokens=len(ids))
        state = digest(PROMPT)
        for token in ids:
            state = mix(state ^ token)
        for k in range(count + in_flight):
            token = 1024 + (salt & 0xFFFF) * 16 + (mix(state ^ salt) & 15)
            state = mix(state ^ token)
            self._record("tokens", made=[[sequence, len(ids) if k < count else len(ids) + k - count, token, salt]])
            if k < count:
                text = text_of([token])
                log.append({"type": "delta", "choice": choice, "index": len(ids), "ids": [token], "text": text})
                ids.append(token)

    def _record(self, event: str, **fields: Any) -> None:
        self.evidence.records.append({"event": event, **fields})

    def note(self, kind: str, **fields: Any) -> None:
        self.t += 0.01
        self.evidence.history.append({"kind": kind, "t": self.t, **fields})


def good_run() -> Evidence:
    run = Run()
    run.job(A, [8, 12, 5])
    run.job(B, [6, 7], n=2)
    return run.evidence


def log_of(evidence: Evidence, job: str) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in evidence.dump["jobs"][job]["log"]]


def put_log(evidence: Evidence, job: str, log: list[dict[str, Any]], *, told: bool = True) -> None:
    """Replace the log, and, where it was told so, what readers saw of it."""
    entry = evidence.dump["jobs"][job]
    entry["log"] = [[f"{k}-0", json.dumps(event)] for k, event in enumerate(log, 1)]
    entry["hash"]["seq"] = str(len(log))
    if told:
        at = next(k for k, line in enumerate(evidence.history) if line.get("job") == job and line["kind"] == "open")
        evidence.history = [
            line for line in evidence.history if line.get("job") != job or line["kind"] not in ("event", "open")
        ]
        lines = [{"kind": "open", "t": 0.5, "by": "early", "job": job, "after": 0}]
        lines += [
            {"kind": "event", "t": 0.5 + k / 100, "by": "early", "job": job, "seq": k, "event": event}
            for k, event in enumerate(log, 1)
        ]
        evidence.history[at:at] = lines


def events(evidence: Evidence, by: str = "early", job: str = A) -> list[dict[str, Any]]:
    return [x for x in evidence.history if x["kind"] == "event" and x["by"] == by and x["job"] == job]


def deltas(log: list[dict[str, Any]]) -> list[int]:
    return [k for k, event in enumerate(log) if event["type"] == "delta"]
