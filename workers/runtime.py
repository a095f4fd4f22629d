"""What one worker process holds: a warm engine, the ledger, the publisher, the lease; and how it runs a job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import redis
import redis.asyncio
from redis.exceptions import RedisError

from tokenfleet.engines.base import Media
from tokenfleet.engines.generation import generate_deltas
from tokenfleet.wire import urls
from tokenfleet.wire.chat import ChatRequest, ScoreRequest
from tokenfleet.wire.errors import (
    EngineDead,
    FleetUnavailable,
    LostState,
    TokenfleetError,
    UnknownJob,
)
from tokenfleet.wire.events import Failed, Finished, Started, Usage
from tokenfleet.wire.jobs import JobOptions, ServedModel, dump_request, parse_request
from tokenfleet.wire.keys import new_id
from tokenfleet.wire.ledger import Claim, Ledger, checked
from tokenfleet.wire.media import MediaSettings, MediaStore, media_entries
from tokenfleet.wire.requests import check_size
from tokenfleet.wire.results import ChatResult
from tokenfleet.workers.asks import Answers
from tokenfleet.workers.control import ControlChannel
from tokenfleet.workers.gate import Gate, Share
from tokenfleet.workers.guardian import Guardian
from tokenfleet.workers.health import Progress
from tokenfleet.workers.lease import Lease
from tokenfleet.workers.publisher import JobWriter, Lost, Publisher, celery_failure, celery_success
from tokenfleet.workers.served import Prepared, Served
from tokenfleet.workers.settings import WorkerSettings
from tokenfleet.workers.takeover import Delivered

log = logging.getLogger(__name__)
T = TypeVar("T")
_ALONE_FROM_STRIKES = 2
_SWEEP_EVERY_S = 30.0


@dataclass(slots=True, eq=False)
class Attempt:
    """A job while this worker runs it."""

    claim: Claim
    task: asyncio.Task[None]
    writer: JobWriter
    delivered: Delivered = field(default_factory=Delivered)
    prompt_tokens: int = 0
    handing_over: bool = False
    missed_beats: int = 0


class Runtime:
    """Lives on the pool's event loop. `open` it once; then `run_job` for every message."""

    def __init__(
        self,
        settings: WorkerSettings,
        served: Served,
        connect: Callable[[], redis.asyncio.Redis],
        connect_blocking: Callable[[], redis.Redis],
        on_dead_engine: Callable[[str], None],
        on_busy: Callable[[bool], None],
        follow_up: Callable[[str], object],
    ) -> None:
        self.settings = settings
        self.served = served
        self.keys = settings.keys
        self.attempts: dict[str, Attempt] = {}
        self.is_draining = False
        self.is_revoked: Callable[[str], bool] = lambda job_id: False
        self.is_leaving: Callable[[], bool] = lambda: False
        self._client = connect()
        self._connect = connect
        self._on_dead_engine = on_dead_engine
        self._on_busy = on_busy
        self._follow_up = follow_up
        self._was_busy = False
        self._strays: dict[str, int] = {}
        self._giving: set[asyncio.Future[None]] = set()
        self._handing_over = asyncio.Lock()
        self.ledger = Ledger(self._client, self.keys)
        self.media = MediaStore(self._client, self.keys, MediaSettings(folder=settings.media_folder))
        self.publisher = Publisher(Ledger(connect(), self.keys, replicas=urls.parse(settings.redis_url).replicas))
        self._guardian = Guardian(settings.redis_url, settings.fleet)
        self.lease = Lease(connect_blocking, self.keys, settings.lease, self, self._guardian)
        self._room = asyncio.Condition()
        self._gate = Gate()
        self._progress = Progress(lambda: self.served.engine.steps, settings.hang_s, settings.lease.heartbeat_s)

    # -- life ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Load the engine, register, serve; at the end hand over what still runs, then close."""
        self.loop = asyncio.get_running_loop()
        self._guardian.start()
        await self.served.start()
        await asyncio.to_thread(self._guardian.wait)
        _freeze_heap()
        self.lease.start()
        while not self.lease.registered.is_set():  # noqa: ASYNC110  (set by a thread; Redis may come up after us)
            await asyncio.sleep(0.02)
        await self._register_model()
        self._answers = Answers(self._client, self.keys, self.served.loaded)
        control = ControlChannel(self._connect, self.keys, lambda: self.lease.worker_id, self._ordered)
        lasting = (self.publisher.run, control.run, self._sweep_media, self._watch_engine)
        tasks = [asyncio.create_task(run()) for run in lasting]
        for task in tasks:
            task.add_done_callback(self._has_ended)
        try:
            yield
        finally:
            await self.hand_over_all()
            await asyncio.to_thread(self.lease.stop)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._answers.close()
            await self.served.close()
            await self._client.aclose()
            await self.publisher.aclose()

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        """Without one of the tasks that last, a worker would keep its lease and its jobs and get nowhere."""
        if not task.cancelled() and (error := task.exception()) is not None:  # a bug
            log.error("a task of the worker's own has ended", exc_info=error)
            self.is_draining = True
            self._on_dead_engine(f"unexpected {type(error).__name__} in {task.get_name()}")

    async def _watch_engine(self) -> None:
        """Notice an engine that dies while nothing runs: else the next job would, and would be struck for it."""
        while True:
            try:
                await self.served.engine.check()
            except EngineDead as error:
                self.is_draining = True
                self._on_dead_engine(str(error))
                return
            await asyncio.sleep(self.settings.lease.heartbeat_s / 2)

    async def _register_model(self) -> None:
        info = self.served.engine.info
        model = ServedModel(
            self.settings.model, info.name, info.context_tokens, info.adapters, info.modalities, info.can_score,
            info.can_generate, self.settings.template,
        )  # fmt: skip
        lease, nonce = self.settings.lease, new_id()
        self.incarnation = await patiently(
            lambda: self.ledger.serve(model, nonce, lease_ms=lease.lease_ms, normal_gap_ms=lease.normal_gap_ms)
        )

    # -- one job ------------------------------------------------------------------------------------------------------

    async def run_job(self, job_id: str) -> bool:
        """Run the job to its end, or as far as it is ours. False: there was nothing to do.

        Raises the job's own error once it is stored (Celery shows it; it holds no text of the job)."""
        claim = await self._claim(job_id)
        if claim is None:
            return False
        task = asyncio.current_task()
        assert task is not None
        writer = self.publisher.open(claim, lambda status: self._lost(job_id, claim.owner, status))
        attempt = Attempt(claim, task, writer)
        self.attempts[job_id] = attempt
        try:
            if self.is_draining:  # since it was asked for: `hand_over_all` has not seen it
                await self._release(attempt)
                return False
            await self._run(attempt)
        except asyncio.CancelledError:
            task.uncancel()
            if writer.lost:
                log.info("job %s: attempt %d stopped (%s)", job_id, claim.epoch, writer.lost)
                return False
            if attempt.handing_over:
                return False
            await asyncio.shield(self._cancelled_by_celery(attempt))
            raise
        except TokenfleetError as error:
            if isinstance(error, EngineDead):
                self.is_draining = True
                # A strike, else a job that kills engines would go round for ever.
                await self._release(attempt, died=True)
                self._on_dead_engine(str(error))
                return False
            await self._fail(attempt, error)
            raise
        except Exception as error:  # the outermost frame of a job: a bug of ours must not leave it without an end
            log.exception("job %s: unexpected error", job_id)
            await self._fail(attempt, TokenfleetError(f"internal error: {type(error).__name__}", code="internal_error"))
            raise
        else:
            if claim.has_links:
                await asyncio.to_thread(self._follow_up, job_id)
            return True
        finally:
            self.attempts.pop(job_id, None)
            async with self._room:
                self._room.notify_all()

    async def _claim(self, job_id: str) -> Claim | None:
        """Wait for room, then make the job ours. None: there is nothing to run."""
        owner = new_id()  # one for all tries: the script knows a claim whose reply was lost
        try:
            await self._wait_for_room(job_id)
            while True:
                if self.is_draining:
                    await patiently(lambda: self.ledger.hold(job_id, self.lease.worker_id))  # sent again when we leave
                    return None
                outcome = await patiently(lambda: self.ledger.claim(job_id, self.lease.worker_id, owner))
                if isinstance(outcome, Claim):
                    return outcome
                if outcome.reason != "unregistered":
                    return None
                await asyncio.sleep(self.settings.lease.heartbeat_s / 4)  # a lapsed lease: its thread registers again
        except asyncio.CancelledError:
            if self.is_revoked(job_id):
                await asyncio.shield(self.revoked(job_id))
            else:  # its claim may have come through: then our leaving would be a death to it
                await asyncio.shield(patiently(lambda: self.ledger.give_back(job_id, self.lease.worker_id, owner)))
            raise

    async def _wait_for_room(self, job_id: str) -> None:
        engine = self.served.engine
        if engine.running < engine.info.slots:
            return
        if await patiently(lambda: self.ledger.hold(job_id, self.lease.worker_id)):
            async with self._room:
                await self._room.wait_for(lambda: engine.running < engine.info.slots or self.is_draining)

    async def _run(self, attempt: Attempt) -> None:
        claim, writer = attempt.claim, attempt.writer
        request = parse_request(claim.request)
        if claim.epoch > 1:
            attempt.delivered = await self._read_log(claim)
        # One more death and it is given up: whatever happens then must be its own doing.
        is_suspect = claim.strikes >= _ALONE_FROM_STRIKES
        async with self._gate.alone() if is_suspect else self._gate.shared() as share:
            if is_suspect and (status := await patiently(lambda: self.ledger.begin(claim))) != "ok":
                writer.lose(status)
                await asyncio.sleep(0)  # where it takes effect
            self.served.check(request)
            media = await self._media(request, claim)
            prepared = await self.served.prepare(request, claim, attempt.delivered, media)
            attempt.prompt_tokens = prepared.prompt_tokens
            fields: dict[str, str | bytes] = {}
            if not claim.prompt or prepared.is_fresh:
                fields = {
                    "prompt": json.dumps(prepared.prompt_ids, separators=(",", ":")),
                    "prompt_tokens": str(prepared.prompt_tokens),
                    "fingerprint": self.served.engine.info.fingerprint,
                }
            writer.put(Started(claim.epoch, self.lease.worker_id, prepared.prompt_tokens, prepared.parser), fields)
            match request:
                case ChatRequest():
                    await self._chat(attempt, prepared, share if is_suspect else None)
                case ScoreRequest():
                    await self._score(attempt, prepared, request.adapter)
        await writer.flushed()

    async def _media(self, request: ChatRequest | ScoreRequest, claim: Claim) -> tuple[Media, ...]:
        """The bytes of the request's media parts, in their order; every attempt fetches them anew."""
        if isinstance(request, ScoreRequest) or not (parts := request.media):
            return ()
        tenant = claim.options.tenant
        fetched = await patiently(lambda: self.media.fetch(tenant, parts))
        return tuple(Media(part.type, data) for part, data in zip(parts, fetched, strict=True))

    async def _sweep_media(self) -> None:
        """Delete the files of media whose time is over."""
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            with contextlib.suppress(RedisError, OSError, FleetUnavailable):
                await self.media.sweep()

    async def _chat(self, attempt: Attempt, prepared: Prepared, share: Share | None) -> None:
        """``share``: ends being alone, to be called once the job has made progress."""
        job, delivered, writer = prepared.job, attempt.delivered, attempt.writer
        assert job is not None
        async with aclosing(generate_deltas(self.served.engine, self.served.tokenizer, job)) as events:
            async for event in events:
                delivered.add(event)
                writer.put(event)
                if share is not None:
                    await writer.flushed()
                    share()
                    share = None
        usage = Usage(prepared.prompt_tokens, delivered.tokens, attempt.claim.epoch)
        choices = tuple(delivered.choices[i].build(with_ids=False) for i in sorted(delivered.choices))
        result = ChatResult(attempt.claim.job_id, choices, usage, parser=prepared.parser)
        writer.finish("finished", Finished(usage), celery_success(attempt.claim.job_id, result))

    async def _score(self, attempt: Attempt, prepared: Prepared, adapter: str | None) -> None:
        scores = tuple(await self.served.score(prepared, adapter))
        usage = Usage(prepared.prompt_tokens, 0, attempt.claim.epoch)
        result = ChatResult(attempt.claim.job_id, (), usage, scores)
        attempt.writer.finish("finished", Finished(usage, scores), celery_success(attempt.claim.job_id, result))

    async def _read_log(self, claim: Claim) -> Delivered:
        delivered, cursor = Delivered(), 0
        while cursor < claim.seq:
            events = await patiently(functools.partial(self.ledger.read, claim.job_id, cursor))
            if not events or events[0][0] != cursor + 1:
                raise LostState(f"The log of job {claim.job_id} ends at event {cursor} of {claim.seq}.")
            for seq, event in events:
                delivered.add(event)
                cursor = seq
        return delivered

    async def _fail(self, attempt: Attempt, error: TokenfleetError) -> None:
        usage = Usage(attempt.prompt_tokens, attempt.delivered.tokens, attempt.claim.epoch)
        meta = celery_failure(attempt.claim.job_id, type(error).__name__, str(error))
        attempt.writer.finish("failed", Failed(error.to_body(), usage), meta)
        await attempt.writer.flushed()
        if attempt.claim.has_links:
            await asyncio.to_thread(self._follow_up, attempt.claim.job_id)

    # -- what others decide -------------------------------------------------------------------------------------------

    def _lost(self, job_id: str, owner: str, status: Lost) -> None:
        attempt = self.attempts.get(job_id)
        if attempt is not None and attempt.claim.owner == owner:
            attempt.task.cancel()

    def _ordered(self, order: str, argument: str) -> None:
        """An order from the control channel; a hint, since the ledger has already decided."""
        if order == "cancel" and (attempt := self.attempts.get(argument)) is not None:
            attempt.writer.lose("ended")
        elif order == "ask":
            self._answers.take(argument)
        elif order == "fenced":
            self._lose_all()

    def _lose_all(self) -> None:
        for attempt in list(self.attempts.values()):
            attempt.writer.lose("fenced")

    async def take_in(
        self, job_id: str, request: ChatRequest | ScoreRequest, options: JobOptions, links: bytes
    ) -> None:
        """Queue a job that came as a Celery message of a user's own, with what follows it."""
        body = dump_request(request)
        check_size(body)
        media = media_entries(options.tenant, request)
        await self.ledger.submit(checked(job_id), self.settings.model, body, options, links=links, media=media)

    async def revoked(self, job_id: str) -> None:
        """Celery threw a revoked job's message away before any task code ran."""
        with contextlib.suppress(UnknownJob):
            await patiently(lambda: self.ledger.cancel(job_id, "revoked"))

    async def _cancelled_by_celery(self, attempt: Attempt) -> None:
        """Celery cancelled the task: revoked, at a time limit (the same as cancel), or because the worker leaves."""
        for _ in range(20):
            if self.is_revoked(attempt.claim.job_id):
                break
            if self.is_draining or self.is_leaving():
                await self._release(attempt)
                return
            await asyncio.sleep(0.01)  # a cold shutdown first cancels, then says so
        with contextlib.suppress(UnknownJob):
            await patiently(lambda: self.ledger.cancel(attempt.claim.job_id, "revoked"))

    async def _release(self, attempt: Attempt, *, died: bool = False) -> bool:
        """Hand a job over; False if it is not ours any more."""
        await attempt.writer.flushed()
        attempt.handing_over = True
        return await patiently(lambda: self.ledger.release(attempt.claim, died=died)) == "ok"

    async def hand_over_all(self) -> None:
        """Stop every running job where it is and give it to the next worker, without a strike.

        Called again (at the end of the worker's life, say) it returns no sooner than the first call: the lease that is
        given back next would be a death to whatever has not been released."""
        self.is_draining = True
        attempts = list(self.attempts.values())
        for attempt in attempts:
            attempt.handing_over = True
            attempt.task.cancel()
        async with self._handing_over:
            await asyncio.gather(*map(self._release, attempts))
        async with self._room:
            self._room.notify_all()

    # -- what the lease asks, from its own thread ---------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        engine = self.served.engine
        return {
            "model": self.settings.model,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "engine": engine.info.name,
            "fingerprint": engine.info.fingerprint,
            "slots": str(min(engine.info.slots, self.settings.concurrency)),
            "running": str(len(self.attempts)),
            "steps": str(engine.steps),
        }

    def running_jobs(self) -> int:
        return len(self.attempts)

    def is_progressing(self) -> bool:
        attempts = list(self.attempts.values())
        if bool(attempts) != self._was_busy:
            self._was_busy = bool(attempts)
            self._on_busy(self._was_busy)
        if self._progress.is_made(self.served.engine.running, sum(a.prompt_tokens for a in attempts)):
            return True
        self._on_dead_engine("it makes no progress")
        return False

    def fenced(self) -> None:
        self.loop.call_soon_threadsafe(self._lose_all)
        self.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._register_model()))

    def owned(self, job_ids: frozenset[str]) -> None:
        self.loop.call_soon_threadsafe(self._compare, job_ids)

    def _compare(self, job_ids: frozenset[str]) -> None:
        """A job that two beats in a row was not ours is lost (one beat: it may just be ending)."""
        for job_id, attempt in list(self.attempts.items()):
            attempt.missed_beats = 0 if job_id in job_ids else attempt.missed_beats + 1
            if attempt.missed_beats >= 2:
                attempt.writer.lose("ended")
        # A claim that came to nothing here must not leave its job with nobody.
        stray = job_ids - self.attempts.keys()
        self._strays = {job_id: self._strays.get(job_id, 0) + 1 for job_id in stray}
        for job_id in stray:
            if self._strays[job_id] >= 3:
                log.warning("job %s is ours by the ledger and runs nowhere: given back", job_id)
                self._give_back(job_id)

    def _give_back(self, job_id: str) -> None:
        giving = asyncio.ensure_future(patiently(lambda: self.ledger.give_back(job_id, self.lease.worker_id)))
        self._giving.add(giving)
        giving.add_done_callback(self._giving.discard)

    def reaped(self, outbox: tuple[str, ...]) -> None:
        for job_id in outbox:
            self._follow_up(job_id)


def _freeze_heap() -> None:
    """What loading made stays: garbage collections needn't look through it, which took a large model's libraries tenths
    of a second each time, and made Python put full ones off until much had gathered."""
    gc.collect()
    gc.freeze()
    gc.collect()  # Python compares with what the last one found


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Ask Redis, again and again while it is away: every script knows a call whose reply was lost."""
    pause_s = 0.05
    while True:
        try:
            return await call()
        except (RedisError, OSError, FleetUnavailable) as error:
            log.info("Redis does not answer (%s); trying until it does", type(error).__name__)
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)
