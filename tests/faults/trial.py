"""A fault run that writes down all it does and sees, and has the checker judge it.

    with Trial(fleet) as trial:
        jobs = [trial.submit(f"job {i}", max_new_tokens=500) for i in range(8)]
        trial.watch(jobs)                  # readers in the background, every event into a history
        trial.until_streaming(jobs, 20)    # proof that work is in flight
        trial.kill(worker)
        trial.judge()                      # waits for all ends, dumps Redis, asserts what the checker finds

Everything is on the fleet's folder, so that a failed run can be judged again: python -m tests.faults.checker FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
import redis

from tests.faults.checker import Evidence, Verdict, check
from tests.fleets import Fleet, Worker, wait_until
from tests.processes import Standstill, on_this_machine
from tokenfleet import Client, Job
from tokenfleet.producer.aio_job import AsyncStream
from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.wire.events import AnyEvent, Delta, Started, encode


class History:
    """One append-only file of JSON lines."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"history-{name}.jsonl").open("ab", buffering=0)

    def note(self, kind: str, **fields: Any) -> None:
        self._file.write(msgspec.json.encode({"kind": kind, "t": time.monotonic(), **fields}) + b"\n")

    def close(self) -> None:
        self._file.close()


class Reading:
    """One reader of one job, running in the background."""

    def __init__(self, client: Client, job: Job, by: str) -> None:
        self.client = client
        self.job = job
        self.by = by
        self.events: list[AnyEvent] = []
        self.delta_times: list[float] = []
        self.takeovers: list[tuple[float, float]] = []
        """Per takeover that fell into the stream: the last delta before it, the first one after; monotonic seconds."""
        self._is_taken_over = False
        self.error: Exception | None = None
        self.pause_s = 0.0
        self.future: Future[None]

    def hear(self, event: AnyEvent, t: float) -> None:
        self.events.append(event)
        if isinstance(event, Started):
            self._is_taken_over = event.epoch > 1 and bool(self.delta_times)
        elif isinstance(event, Delta):
            if self._is_taken_over:
                self.takeovers.append((self.delta_times[-1], t))
                self._is_taken_over = False
            self.delta_times.append(t)

    @property
    def tokens(self) -> int:
        return sum(len(event.ids) for event in self.events if isinstance(event, Delta))

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))


def stopping(at: int, prompt: str = "count") -> str:
    """A prompt whose first attempt makes ``at`` tokens and no more: whoever kills its worker finds it unended, however
    slow the machine is (the scripted engine's workers with faults)."""
    return f"{prompt} [[fault: hang at {at} on attempt 1]]"


class Trial:
    def __init__(self, fleet: Fleet, *, client: Client | None = None) -> None:
        self.fleet = fleet
        self.client = client or fleet.client()
        self.history = History(fleet.folder, f"{len(fleet.clients)}-{time.monotonic_ns()}")
        self.readings: list[Reading] = []
        self._stalls = Standstill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reading in self.readings:
            reading.future.cancel()
        self._stalls.end()
        self.history.close()

    # -- clients ------------------------------------------------------------------------------------------------------

    def submit(self, messages: Any = "count", /, **named: Any) -> Job:
        """Raises what the fleet refuses it with; that is noted too."""
        try:
            job = self.client.submit(messages, **named)
        except TokenfleetError as error:
            self.history.note("refused", code=error.code, job=named.get("job_id"))
            raise
        self.history.note("accepted", job=job.id, n=named.get("n", 1), max_new_tokens=named.get("max_new_tokens"))
        return job

    def submit_many(self, count: int, *, stops_at: int | None = None, **named: Any) -> list[Job]:
        """``stops_at``: of `stopping`."""
        prompts = [f"question {i}" for i in range(count)]
        if stops_at is not None:
            prompts = [stopping(stops_at, prompt) for prompt in prompts]
        jobs = self.client.submit_many(prompts, **named)
        for job in jobs:
            self.history.note("accepted", job=job.id, n=named.get("n", 1), max_new_tokens=named.get("max_new_tokens"))
        return jobs

    def watch(
        self, jobs: Job | Iterable[Job], by: str = "reader", *, pause_s: float = 0.0, client: Client | None = None
    ) -> list[Reading]:
        """Read in the background until the end. ``pause_s``: a slow reader's rest after each batch."""
        begun = []
        for job in [jobs] if isinstance(jobs, Job) else jobs:
            reading = Reading(client or self.client, job, by)
            reading.pause_s = pause_s
            reading.future = asyncio.run_coroutine_threadsafe(self._read(reading), reading.client.thread.loop)
            begun.append(reading)
        self.readings += begun
        return begun

    async def _read(self, reading: Reading, after: int = 0) -> None:
        job, by = reading.job.id, reading.by
        self.history.note("open", by=by, job=job, after=after)
        try:
            async with reading.client.aio.job(job).stream(after) as stream:
                await self._note_all(stream, reading)
        except TokenfleetError as error:
            reading.error = error
            self.history.note("error", by=by, job=job, code=error.code)

    async def _note_all(self, stream: AsyncStream, reading: Reading) -> None:
        while batch := await stream.next_batch():
            for seq, event in batch:
                raw = msgspec.Raw(encode(event))
                self.history.note("event", by=reading.by, job=reading.job.id, seq=seq, event=raw)
                reading.hear(event, time.monotonic())
            if reading.pause_s:
                await asyncio.sleep(reading.pause_s)

    def read_now(self, job: Job, by: str, after: int = 0) -> list[AnyEvent]:
        """Read to the end, in the foreground."""
        reading = Reading(self.client, job, by)
        self.client.thread.run(self._read(reading, after))
        return reading.events

    # -- faults -------------------------------------------------------------------------------------------------------

    def fault(self, what: str, pid: int = 0, *, cuts: bool = True) -> None:
        """Note a fault that is about to happen. ``cuts``: it must land in the middle of streams, or proves nothing."""
        self.history.note("fault", what=what, pid=pid, cuts=cuts)

    def kill(self, worker: Worker, *, whole_group: bool = True, cuts: bool = True) -> None:
        self.fault("SIGKILL", worker.pid, cuts=cuts)
        (worker.kill_group if whole_group else worker.kill_main)(signal.SIGKILL)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def until_streaming(
        self, tokens: int = 10, readings: Iterable[Reading] | None = None, timeout_s: float = 60
    ) -> None:
        """Until each reader has so many tokens (and none is at its end)."""
        watched = list(readings if readings is not None else self.readings)
        wait_until(lambda: all(r.tokens >= tokens for r in watched), timeout_s, f"{tokens} tokens everywhere")
        assert not any(r.future.done() for r in watched), "a stream has ended before the fault: nothing would be proven"

    def until_over(self, timeout_s: float = 60) -> None:
        """``timeout_s``: of `limit`."""
        started = time.monotonic()
        for reading in self.readings:
            while True:
                left_s = self.limit(timeout_s) - (time.monotonic() - started)
                try:
                    reading.future.result(min(1.0, max(0.01, left_s)))
                except TimeoutError:
                    if left_s <= 0:
                        pytest.fail(f"job {reading.job.id}: no end within {timeout_s:g} s; {reading.tokens} tokens")
                else:
                    break

    # -- judging ------------------------------------------------------------------------------------------------------

    def limit(self, limit_s: float) -> float:
        """For what a reader here has seen: of `on_this_machine`, and as much more as that stood still."""
        return on_this_machine(limit_s) + self._stalls.lost_s

    def judge(self, *, timeout_s: float = 60, may_have: Iterable[str] = (), **options: Any) -> Verdict:
        """Wait for all readers, dump Redis, and assert that the checker finds nothing (but ``may_have``)."""
        self.until_over(timeout_s)
        dump(self.fleet)
        verdict = check(Evidence.load(self.fleet.folder), **options)
        stalls = sorted(round(stall, 2) for stall in verdict.stalls_s)
        print(f"[{self.fleet.folder.name}] {verdict.summary()}; longest stalls: {stalls[-5:]} s")
        bad = [v for v in verdict.violations if v.code not in may_have]
        assert not bad, f"{len(bad)} violations; the first: " + "\n".join(map(str, bad[:8]))
        assert not verdict.invalid, verdict.invalid
        return verdict


def dump(fleet: Fleet, *, leftovers: dict[str, int] | None = None) -> None:
    """Redis' data of this fleet as the checker reads it, by a plain client."""
    client: Any = fleet.redis.client(decode_responses=True)
    prefix = f"tokenfleet:{fleet.redis.fleet}:"
    jobs: dict[str, Any] = {}
    ids = [key.removeprefix(f"{prefix}job:") for key in client.scan_iter(f"{prefix}job:*", count=1000)]
    for chunk in batched(ids, 500):
        pipe = client.pipeline(transaction=False)
        for job in chunk:
            pipe.hgetall(f"{prefix}job:{job}").xrange(f"{prefix}log:{job}").get(f"celery-task-meta-{job}")
        replies = iter(pipe.execute())
        for job in chunk:
            stored, log, celery = next(replies), next(replies), next(replies)
            jobs[job] = {"hash": stored, "log": [[i, f.get("e", "")] for i, f in log], "celery": celery}
    data = {"prefix": prefix, "jobs": jobs, "leftovers": leftovers or {}}
    (fleet.folder / "dump.json").write_text(json.dumps(data))
    client.close()


def batched(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def ledger_of(fleet: Fleet, job: Job) -> dict[str, str]:
    """A job's ledger entry, by a plain client."""
    client: redis.Redis = fleet.redis.client(decode_responses=True)
    with client:
        return client.hgetall(f"tokenfleet:{fleet.redis.fleet}:job:{job.id}")  # type: ignore[return-value]


def aborted(worker: Worker) -> int:
    """How many sequences of this worker ended by an abort: freed slots."""
    return sum(line["event"] == "end" and line["reason"] == "abort" for line in worker.record)


def ends(worker: Worker) -> dict[str, float]:
    """When each sequence last left this worker's engine, by its own record; monotonic seconds."""
    return {line["sequence_id"]: line["t"] for line in worker.record if line["event"] == "end"}


def running(worker: Worker) -> set[str]:
    """Sequences that hold a slot of this worker's engine."""
    begun = {line["sequence_id"] for line in worker.record if line["event"] == "prefill"}
    return begun - {line["sequence_id"] for line in worker.record if line["event"] == "end"}


__all__ = ["History", "Reading", "Trial", "aborted", "dump", "ends", "ledger_of", "running", "stopping"]
