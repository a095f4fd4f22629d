"""What the ledger's scripts promise, written again as plain Python over dicts, to hold the Lua against.

It knows no Redis, no time and none of the product's code: deadlines, leases and lost messages are flags that a test
sets. Every method gives the reply that the script must give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_STRIKES = 3


@dataclass
class Job:
    id: str
    body: str
    lane: int
    state: str = "queued"
    epoch: int = 0
    owner: str = ""
    worker: str = ""
    log: list[str] = field(default_factory=lambda: ["queued"])
    """What stands in the log: texts of the test's own events, and ``queued`` or a terminal's type for Lua's."""
    tokens: int = 0
    progress: int = 0
    strikes: int = 0
    parked: int = 0
    """The attempt that waits for its turn to run alone."""
    last_owner: str = ""
    handed_by: set[str] = field(default_factory=set)
    is_delayed: bool = False
    is_overdue: bool = False
    is_gone: bool = False

    @property
    def is_ended(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass
class Attempt:
    """A claim as its worker remembers it, for ever: also long after it was fenced."""

    job: Job
    epoch: int
    owner: str
    seq: int
    tokens: int
    calls: list[Append] = field(default_factory=list)


@dataclass(frozen=True)
class Append:
    """One call's arguments; ``first`` is the seq of its first event."""

    first: int
    tokens: int
    events: tuple[str, ...]
    final: str


class Ledger:
    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.workers: set[str] = set()
        self.held: dict[str, set[str]] = {}

    def submit(self, job_id: str, body: str, lane: int, *, is_delayed: bool) -> str:
        known = self.jobs.get(job_id)
        if known is not None and not known.is_gone:
            return "exists" if known.body == body else "conflict"
        self.jobs[job_id] = Job(job_id, body, lane, is_delayed=is_delayed)
        return "accepted"

    def claim(self, job: Job, worker: str, owner: str) -> tuple[str, ...]:
        self.held.get(worker, set()).discard(job.id)
        if refusal := self._refusal(job, worker, owner):
            return refusal
        if job.state == "queued":
            job.state, job.owner, job.worker, job.epoch = "running", owner, worker, job.epoch + 1
            job.is_delayed = False
            if job.strikes == MAX_STRIKES - 1:
                job.parked = job.epoch
        return ("claimed", str(job.epoch), str(len(job.log)), str(job.tokens), str(job.strikes))

    def hold(self, job: Job, worker: str) -> tuple[str, ...]:
        if refusal := self._refusal(job, worker, ""):
            return refusal
        self.held.setdefault(worker, set()).add(job.id)
        job.worker = worker
        return ("held",)

    def _refusal(self, job: Job, worker: str, owner: str) -> tuple[str, ...]:
        if job.is_gone:
            return ("gone",)
        if job.is_ended:
            return ("ended", job.state)
        if worker not in self.workers:
            return ("unregistered",)
        if job.state == "running":
            return () if job.owner == owner else ("running",)
        if job.is_overdue:
            self.close(job, "expired")
            return ("ended", "expired")
        return ()

    def append(self, attempt: Attempt, call: Append) -> str:
        job, last = attempt.job, call.first + len(call.events) - 1
        if job.is_gone:
            return "gone"
        if job.is_ended:
            return "ok" if job.last_owner == attempt.owner and len(job.log) == last else "ended"
        if job.state != "running" or (job.epoch, job.owner) != (attempt.epoch, attempt.owner):
            return "fenced"
        if call.first > len(job.log) + 1:
            self.close(job, "failed")
            return "gap"
        job.log += call.events[len(job.log) + 1 - call.first :]
        if call.tokens > job.tokens:
            job.tokens, job.progress = call.tokens, job.epoch
        if not call.events:
            job.parked = 0
        if call.final:
            job.last_owner = job.owner
            self._end(job, call.final)
        return "ok"

    def cancel(self, job: Job) -> tuple[str, ...]:
        if job.is_gone:
            return ("gone",)
        if job.is_ended:
            return ("ended", job.state)
        self.close(job, "cancelled")
        return ("cancelled",)

    def lost(self, job: Job, seq: int) -> str:
        if job.is_gone:
            return "gone"
        if job.is_ended:
            return "ended"
        if len(job.log) >= seq:
            return "kept"
        self.close(job, "failed")
        return "lost"

    def release(self, attempt: Attempt, *, died: bool) -> str:
        job = attempt.job
        if job.is_gone:
            return "gone"
        if attempt.owner in job.handed_by:
            return "ok"
        if job.state != "running" or (job.epoch, job.owner) != (attempt.epoch, attempt.owner):
            return "fenced"
        job.handed_by = {attempt.owner}  # the last one's retry is known; older ones are fenced by epoch
        if died:
            self._strike(job)
        else:
            self._requeue(job)
        return "ok"

    def bury(self, worker: str) -> tuple[int, int]:
        requeued = given_up = 0
        for job in self.jobs.values():
            if job.is_gone or job.state != "running" or job.worker != worker:
                continue
            if self._strike(job):
                given_up += 1
            else:
                requeued += 1
        self.workers.discard(worker)
        self.held.pop(worker, None)
        return requeued, given_up

    def _strike(self, job: Job) -> bool:
        if job.progress == job.epoch:
            job.strikes = 0
        elif job.parked != job.epoch:
            job.strikes += 1
        if job.strikes >= MAX_STRIKES:
            self.close(job, "failed")
            return True
        self._requeue(job)
        return False

    def close(self, job: Job, state: str) -> None:
        job.log.append(state)
        self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.state, job.owner, job.is_overdue, job.is_delayed = state, "", False, False

    def _requeue(self, job: Job) -> None:
        job.state, job.owner, job.worker = "queued", "", ""
