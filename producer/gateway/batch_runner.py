"""Drives batches. Every gateway has one; a batch's lease says which one drives it, and its death hands it on.

Rows become jobs a window at a time. Ended rows are written, in order, to parts in the storage; once a part is recorded
its rows never run again. All that is not recorded is done again by the next driver, and comes out the same: a row's job
has an id of its own. So a driver that meets trouble (Redis or the storage away) just lets go.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable

import msgspec
from redis.exceptions import RedisError

from tokenfleet.producer.gateway.batch_input import Line, lines, parse, validate
from tokenfleet.producer.gateway.batch_rows import Ending, Outcome, RowClient, RowRunner
from tokenfleet.producer.gateway.batch_store import BatchStore, Fenced, Part, Record
from tokenfleet.producer.gateway.errors import NotFound
from tokenfleet.producer.gateway.file_store import FileStore, StoredFile
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.producer.gateway.storage import Storage
from tokenfleet.wire.errors import FleetUnavailable, TokenfleetError, UnknownJob

log = logging.getLogger(__name__)

_POLL_S = 1.0
_SWEEP_S = 60.0
_AGAIN_S = 5.0
"""Between two tries at a batch whose Redis or storage failed."""
_MOST_BATCHES = 16
PART_ROWS, PART_BYTES, PART_AGE_S = 500, 4 * 1024 * 1024, 3600.0
"""When ended rows become a part: sooner than their jobs' retention ends."""
_HELD_BYTES = 64 * 1024 * 1024
"""Rows that run, and ended ones that wait for an earlier one, are held up to here."""
_DONE_KEEP_MS = 60_000
"""A row in a part needs its job no more; a driver that was fenced may still ask for a moment."""


class BatchRunner:
    """``make_rows`` gives a `RowRunner` for a batch."""

    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        storage: Storage,
        client: RowClient,
        settings: GatewaySettings,
        make_rows: Callable[[Record], RowRunner],
    ) -> None:
        self.store = store
        self.files = files
        self.storage = storage
        self.client = client
        self.settings = settings
        self.make_rows = make_rows
        self._owner = secrets.token_hex(8)
        self._driven: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be a new batch."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; then batches are let go, so that another gateway takes them at once."""
        swept_s = 0.0
        try:
            while True:
                try:
                    for batch_id in await self.store.take(self._owner, _MOST_BATCHES - len(self._driven)):
                        task = asyncio.create_task(self._drive(batch_id))
                        self._driven[batch_id] = task
                    self._driven = {i: task for i, task in self._driven.items() if not task.done()}
                    if time.monotonic() - swept_s > _SWEEP_S:
                        swept_s = time.monotonic()
                        await self.files.sweep()
                except (RedisError, OSError) as error:
                    log.warning("batches: %s; trying again", type(error).__name__)
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._wake.wait()
        finally:
            driven = dict(self._driven)
            for task in driven.values():
                task.cancel()
            await asyncio.gather(*driven.values(), return_exceptions=True)
            for batch_id in driven:
                with contextlib.suppress(RedisError, OSError):
                    await self.store.release(batch_id, self._owner)

    async def _drive(self, batch_id: str) -> None:
        if await self._is_driven(batch_id):
            return
        await asyncio.sleep(_AGAIN_S)
        with contextlib.suppress(RedisError, OSError):
            await self.store.release(batch_id, self._owner)

    async def _is_driven(self, batch_id: str) -> bool:
        """To its end, or by another gateway. False: something failed, and it is to be tried again."""
        try:
            await _Drive(self, await self.store.get(batch_id), self._owner).run()
        except Fenced:
            log.info("batch %s: another gateway drives it", batch_id)
        except (RedisError, OSError, TokenfleetError) as error:
            log.warning("batch %s: %s; it goes on in a moment", batch_id, type(error).__name__)
            return False
        except Exception:  # the task's outermost frame
            log.exception("batch %s: a bug; it is tried again", batch_id)
            return False
        return True


class _Drive:
    """One batch, driven by this process."""

    def __init__(self, runner: BatchRunner, record: Record, owner: str) -> None:
        self._runner = runner
        self._store, self._files, self._storage = runner.store, runner.files, runner.storage
        self._id, self._owner, self._record = record.id, owner, record
        self._progress = record.progress
        self._rows = runner.make_rows(record)
        self._pending: dict[int, asyncio.Task[Outcome]] = {}
        self._jobs: dict[int, list[str]] = {}
        self._ends: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._ended: dict[int, Outcome] = {}
        self._held_bytes = 0
        """Of rows that run, and of outcomes that wait for an earlier row."""
        self._part_s = time.monotonic()
        self._ending = Ending()
        self._heard(record.status)

    async def run(self) -> None:
        work = asyncio.create_task(self._work())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=min(_POLL_S, self._store.lease_ms / 5000))
                if not work.done():
                    await self._beat()
            await work
        finally:
            for task in (work, *self._pending.values()):
                task.cancel()
            await asyncio.gather(work, *self._pending.values(), return_exceptions=True)

    async def _beat(self) -> None:
        done = [outcome.is_ok for outcome in self._ended.values()]
        counts = {"completed": self._progress.ok + sum(done), "failed": self._progress.bad + len(done) - sum(done)}
        with contextlib.suppress(RedisError, OSError):  # the next one may come through; until then others see our lease
            self._heard(await self._store.save(self._id, self._owner, **counts))

    async def _save(self, status: str | None = None) -> None:
        fields: dict[str, str | int | bytes] = {"progress": msgspec.json.encode(self._progress)}
        if status is not None:
            fields["status"] = status
        self._heard(await self._store.save(self._id, self._owner, **fields))

    def _heard(self, status: str) -> None:
        if status == "cancelling":
            self._ending.begin("batch_cancelled")
        elif time.time() >= self._record.expires_s:
            self._ending.begin("batch_expired")

    async def _work(self) -> None:
        try:
            file = await self._files.get(self._record.fixed.input_file_id, self._record.tenant)
            if self._record.status in ("validating", "cancelling") and not self._progress.total:
                limits = self._runner.settings
                total, errors = await validate(
                    self._files.read(file), self._record.fixed.endpoint, limits.batch_max_rows, limits.max_body_bytes
                )
                self._progress.total, self._progress.errors = total, errors
            if not self._progress.errors:
                if self._record.status != "finalizing":
                    await self._save("in_progress")
                await self._all_rows(file)
        except (NotFound, FileNotFoundError):
            gone = {"line": None, "code": "input_file_missing", "param": "input_file_id",
                    "message": "The input file was deleted."}  # fmt: skip
            self._progress.errors.append(gone)
        if not self._progress.errors:
            await self._save("finalizing")
        await self._finalize()

    async def _all_rows(self, file: StoredFile) -> None:
        p, settings = self._progress, self._runner.settings
        pieces = self._files.read(file, p.offset)
        at = lines(pieces, settings.max_body_bytes, number=p.row, offset=p.offset)
        async with contextlib.aclosing(at), contextlib.aclosing(pieces):
            async for line in at:
                while not self._ending.why and self._is_full():
                    await self._some_end()
                await self._start(line)
            while self._pending:
                await self._some_end()
        await self._write_parts(everything=True)

    def _is_full(self) -> bool:
        window = self._runner.settings.batch_window
        ahead = len(self._pending) + len(self._ended)
        is_heavy = self._held_bytes >= _HELD_BYTES and bool(self._pending)
        return len(self._pending) >= window or ahead >= 2 * PART_ROWS + window or is_heavy

    async def _start(self, line: Line) -> None:
        row = parse(line.data)
        self._ends[line.number] = line.end
        if self._ending.why:
            if self._pending:
                await self._cancel_pending()
            self._end(line.number, self._rows.unrun(line.number, row.custom_id, self._ending.why))
            await self._write_parts()
            return
        self._held_bytes += len(line.data)
        self._sizes[line.number] = len(line.data)
        jobs = self._jobs[line.number] = []
        self._pending[line.number] = asyncio.create_task(self._rows.run(line.number, row, jobs, self._ending))

    async def _some_end(self) -> None:
        """Wait for a row to end, or for the batch to be stopped; write what is complete."""
        if self._ending.why:
            await self._cancel_pending()
            return
        stopped = asyncio.create_task(self._ending.event.wait())
        try:
            await asyncio.wait([*self._pending.values(), stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        self._collect()
        await self._write_parts()

    async def _cancel_pending(self) -> None:
        """End the rows that run; those that were done just before keep their answers."""
        cancelled: set[str] = set()
        while self._pending:
            for number in self._pending:
                for job_id in self._jobs[number]:
                    if job_id not in cancelled:
                        cancelled.add(job_id)
                        with contextlib.suppress(UnknownJob, FleetUnavailable):  # not submitted yet: asked again below
                            await self._runner.client.ledger.cancel(job_id, self._ending.why)
            await asyncio.wait(self._pending.values(), timeout=0.5, return_when=asyncio.ALL_COMPLETED)
            self._collect()
            cancelled.clear()
        await self._write_parts()

    def _collect(self) -> None:
        for number, task in list(self._pending.items()):
            if task.done():
                del self._pending[number]
                self._end(number, task.result())

    def _end(self, number: int, outcome: Outcome) -> None:
        self._jobs.pop(number, None)
        self._held_bytes -= self._sizes.pop(number, 0)
        self._ended[number] = outcome
        self._held_bytes += len(outcome.line)

    async def _write_parts(self, *, everything: bool = False) -> None:
        """Write the ended rows that follow the last part, if they are enough, and record them."""
        p = self._progress
        ready: list[Outcome] = []
        while (outcome := self._ended.get(p.row + len(ready))) is not None:
            ready.append(outcome)
        is_old = time.monotonic() - self._part_s > PART_AGE_S
        size = sum(len(outcome.line) for outcome in ready) if len(ready) < PART_ROWS else 0
        if not ready or not (everything or is_old or len(ready) >= PART_ROWS or size >= PART_BYTES):
            return
        # Names of our own: a driver that was fenced may still be writing.
        for kind, is_ok in (("out", True), ("err", False)):
            text = b"".join(outcome.line for outcome in ready if outcome.is_ok is is_ok)
            if text:
                name = f"batches/{self._id}/{p.row:08d}-{kind}-{secrets.token_hex(4)}"
                await self._storage.write(name, _once(text))
                p.parts.append(Part(kind, name))
        for outcome in ready:
            p.unrun += outcome.is_unrun
            p.ok, p.bad = p.ok + outcome.is_ok, p.bad + (not outcome.is_ok)
            p.input_tokens += outcome.usage.prompt_tokens + outcome.usage.input_tokens
            p.output_tokens += outcome.usage.completion_tokens + outcome.usage.output_tokens
            p.model = p.model or outcome.model
            self._held_bytes -= len(outcome.line)
        last = p.row + len(ready) - 1
        p.offset = self._ends[last]
        for number in range(p.row, last + 1):
            del self._ended[number], self._ends[number]
        p.row = last + 1
        self._part_s = time.monotonic()
        await self._save()
        await self._forget([job_id for outcome in ready for job_id in outcome.jobs])

    async def _forget(self, job_ids: list[str]) -> None:
        """The rows' jobs have done their work: their results need not fill Redis for a day."""
        keys = self._runner.client.keys
        pipe = self._runner.client.ledger.client.pipeline(transaction=False)
        for job_id in job_ids:
            for name in (keys.job(job_id), keys.log(job_id), f"celery-task-meta-{job_id}"):
                pipe.pexpire(name, _DONE_KEEP_MS, lt=True)
        await pipe.execute()

    async def _finalize(self) -> None:
        p = self._progress
        p.output_file_id = await self._file("out", "output")
        p.error_file_id = await self._file("err", "errors")
        status = self._ending.why.removeprefix("batch_") if p.unrun else "completed"
        if p.errors:
            status = "failed"
        parts, p.parts = p.parts, []
        await self._store.save(
            self._id, self._owner, completed=p.ok, failed=p.bad, progress=msgspec.json.encode(p), status=status
        )
        if parts:
            await self._storage.delete_below(f"batches/{self._id}")

    async def _file(self, kind: str, word: str) -> str | None:
        """The parts as one file; a driver that died here made the same, or nothing."""
        parts = [part.name for part in self._progress.parts if part.kind == kind]
        if not parts:
            return None
        file_id = "file-" + hashlib.sha256(f"{self._id}\0{kind}".encode()).hexdigest()[:32]
        tenant = self._record.tenant
        with contextlib.suppress(NotFound):
            return (await self._files.get(file_id, tenant)).id
        name, size = await self._files.write(file_id, self._joined(parts))
        now = int(time.time())
        ends = now + int(self._record.fixed.output_expiry_s or self._runner.settings.file_expiry_s)
        file = StoredFile(file_id, tenant, f"{self._id}_{word}.jsonl", "batch_output", size, now, name, expires_at=ends)
        return (await self._files.add(file, is_free=True)).id

    async def _joined(self, names: list[str]) -> AsyncIterator[bytes]:
        for name in names:
            async for piece in self._storage.read(name):
                yield piece


async def _once(text: bytes) -> AsyncIterator[bytes]:
    yield text
