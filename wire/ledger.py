"""The ledger: jobs' records in Redis, through the scripts. One method a script, typed, over an asyncio client."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import msgspec
import redis.asyncio
from pydantic import ValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenfleet.wire import scripts
from tokenfleet.wire.errors import (
    ErrorBody,
    FleetUnavailable,
    JobConflict,
    LostState,
    MediaGone,
    Overloaded,
    UnknownJob,
    UnknownModel,
)
from tokenfleet.wire.events import AnyEvent, decode
from tokenfleet.wire.jobs import JobOptions, JobStatus, ServedModel, State, digest, invalid
from tokenfleet.wire.keys import Keys, is_id

AppendStatus = Literal["ok", "fenced", "ended", "gone", "gap"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker gets with a job. ``seq`` is the last event written; the log holds what was delivered."""

    job_id: str
    epoch: int
    owner: str
    seq: int
    request: bytes
    prompt: bytes
    """JSON array of the prompt's token ids, stored by the first attempt; empty before."""
    fingerprint: str
    strikes: int
    deadline_ms: int
    tokens: int
    now_ms: int
    stored_options: bytes = b"{}"
    has_links: bool = False
    """Celery messages are to follow its end (`workers/links.py`)."""

    @property
    def options(self) -> JobOptions:
        """Raises `InvalidRequest`."""
        try:
            return JobOptions.model_validate_json(self.stored_options)
        except ValidationError as error:
            raise invalid(error, "the stored options are not valid") from error


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """``running``: another has it. ``unregistered``: the asking worker's own lease has lapsed. ``elsewhere``: another
    version began it, of which there is a worker; it is sent again."""

    reason: Literal["gone", "ended", "running", "unregistered", "elsewhere"]


@dataclass(slots=True)
class Batch:
    """One job's part of an append call."""

    job_id: str
    epoch: int
    owner: str
    first_seq: int
    tokens: int
    events: list[bytes]
    fields: Mapping[str, str | bytes] = field(default_factory=dict)
    final: State | Literal[""] = ""
    celery_meta: bytes = b""

    def args(self) -> Iterable[scripts.Arg]:
        yield from (self.job_id, self.epoch, self.owner, self.first_seq, self.tokens, len(self.fields))
        for name, value in self.fields.items():
            yield from (name, value)
        yield len(self.events)
        yield from self.events
        yield self.final
        if self.final:
            yield self.celery_meta


@dataclass(frozen=True, slots=True)
class Reaped:
    requeued: int
    given_up: int
    expired: int
    sent_again: int
    released: int
    outbox: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A job as it was submitted. ``shown``: what its submitter laid beside it, to be shown again."""

    model: str
    state: State
    request: bytes
    shown: bytes
    options: JobOptions
    submitted_ms: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Polled:
    state: State
    seq: int
    position: int | None


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Redis' own exceptions as tokenfleet's."""
    try:
        yield
    except OutOfMemoryError as error:
        raise Overloaded("Redis is full.", code="memory_full", hint="Try again later.", retry_after_s=5.0) from error
    except (RedisConnectionError, RedisTimeoutError, ReadOnlyError) as error:
        raise FleetUnavailable(
            f"Redis can't be reached: {str(error).rstrip('.')}.",
            code="redis_unavailable",
            hint="Is it running, and is the URL right?",
        ) from error
    except RedisError as error:
        raise FleetUnavailable(f"Redis refused: {error}", code="redis_error") from error


REPLICATION_MS = 1000
"""How long one call waits for replicas."""


class Ledger:
    """``client`` must decode nothing (bytes out). Methods raise redis-py's exceptions unless they say otherwise.

    ``replicas``: `submit`, `append` and `read` return only once so many replicas of Redis have what they wrote or read,
    so that a failover takes back nothing that a caller has seen. Each costs a round trip to the replicas."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, *, replicas: int = 0) -> None:
        self.client = client
        self.keys = keys
        self.replicas = replicas
        self._db: Any = client  # redis-py's annotations can't tell a client that decodes from one that doesn't

    async def _run(self, name: scripts.Name, *args: scripts.Arg) -> Any:
        return await scripts.run(self.client, name, self.keys.prefix, *args)

    async def _run_durably(self, name: scripts.Name, *args: scripts.Arg) -> Any:
        """Raises a `RedisConnectionError` if it is done but not yet safe: the same again is a no-op."""
        if not self.replicas:
            return await self._run(name, *args)
        reply, has_it = await scripts.run_then_wait(
            self.client, name, self.replicas, REPLICATION_MS, self.keys.prefix, *args
        )
        if has_it < self.replicas:
            raise RedisConnectionError(f"{has_it} of {self.replicas} replicas have what was written")
        return reply

    async def submit(
        self,
        job_id: str,
        model: str,
        request: bytes,
        options: JobOptions,
        *,
        max_queued: int = 100_000,
        links: bytes = b"",
        shown: bytes = b"",
        media: Sequence[str] = (),
        tokens: int = 0,
    ) -> int:
        """Write the job, its first event and its Celery message, all or nothing. Returns how many wait before it.

        ``media`` are the `media_entry` of what the request refers to; they stay as long as the job needs them.
        ``tokens`` is what it may come to: taken from the tenant's tokens per minute now, settled when it has ended.
        Submitting the same again is a no-op. Raises `JobConflict`, `UnknownModel`, `Overloaded`, `MediaGone`,
        `FleetUnavailable`."""
        priority = int(options.lane)
        pairs: list[scripts.Arg] = ["request", request, "retention_ms", int(options.kept_s * 1000)]
        # What stands in a field of its own is not said twice: a worker of an older release need not know it.
        stored = options.model_dump_json(exclude_defaults=True, exclude={"webhook", "webhook_kind"})
        if stored != "{}":
            pairs += ["options", stored]
        if links:
            pairs += ["links", links]
        if options.tenant:
            pairs += ["tenant", options.tenant, "charged", tokens]
        if options.webhook:
            hook = {"url": options.webhook, "tenant": options.tenant, "kind": options.webhook_kind}
            pairs += ["hook", msgspec.json.encode(hook)]
        if shown:
            pairs += ["shown", shown]
        if media:
            pairs += ["media", " ".join(dict.fromkeys(media))]
        async with translated():
            reply = await self._run_durably(
                "submit",
                job_id,
                digest(model, request, options),
                model,
                self.keys.queue(model),
                priority,
                int(options.delay_s * 1000),
                int(options.queue_ttl_s * 1000),
                int(options.deadline_s * 1000),
                max_queued,
                *pairs,
            )
        match reply[0]:
            case b"accepted":
                return int(reply[1])
            case b"exists":
                return 0
            case b"conflict":
                raise JobConflict(f"Job {job_id} exists with another body.", hint="Use a new id.")
            case b"unknown_model":
                raise UnknownModel(
                    f"This fleet serves no model named {model!r}.",
                    hint="`tokenfleet status` lists the served models.",
                    param="model",
                )
            case b"memory_full":
                raise Overloaded(
                    f"Redis is {int(reply[1])} % full; new jobs are taken below 80 %.",
                    code="memory_full",
                    hint="Try again later, or give Redis more memory.",
                    retry_after_s=5.0,
                )
            case b"tenant_jobs":
                raise Overloaded(
                    f"{int(reply[1])} of your jobs run or wait already; you may have no more.",
                    code="too_many_jobs",
                    hint="Try again when one has ended.",
                    retry_after_s=2.0,
                )
            case b"tenant_queue":
                raise Overloaded(
                    f"{int(reply[1])} of your jobs wait for {model!r} already: that is your share of the queue.",
                    code="queue_share_full",
                    hint="Try again later.",
                    retry_after_s=2.0,
                )
            case b"tenant_tokens":
                raise Overloaded(
                    f"You may use {int(reply[1])} tokens a minute; this may take {tokens}.",
                    code="rate_limited",
                    hint="Try again later, or ask for fewer tokens.",
                    retry_after_s=int(reply[2]) / 1000,
                )
            case b"media_gone":
                raise media_gone([entry.decode().partition(":")[2] for entry in reply[1:]])
            case _:
                waiting, rate = int(reply[1]), float(reply[2])
                raise Overloaded(
                    f"{waiting} jobs wait for {model!r}; the queue takes no more than {max_queued}.",
                    code="queue_full",
                    hint="Try again later.",
                    retry_after_s=float(math.ceil(1 / rate)) if rate else 5.0,
                )

    async def claim(self, job_id: str, worker: str, owner: str) -> Claim | NotClaimed:
        """Make the job this worker's own, under the nonce ``owner``."""
        r = await self._run("claim", job_id, worker, owner, "claim")
        if r[0] != b"claimed":
            return NotClaimed(r[0].decode())
        return Claim(
            job_id, int(r[1]), owner, int(r[2]), r[3], r[4], r[5].decode(), int(r[6]), int(r[7]), int(r[8]), int(r[9]),
            r[10], bool(r[11]),
        )  # fmt: skip

    async def hold(self, job_id: str, worker: str) -> bool:
        """Say that this worker has the job's message and waits for room. False: there is nothing to wait for."""
        return bool((await self._run("claim", job_id, worker, "", "hold"))[0] == b"held")

    async def append(self, batches: Sequence[Batch]) -> list[AppendStatus]:
        """Write events of many jobs in one call, and end those with a ``final`` state."""
        args = [arg for batch in batches for arg in batch.args()]
        return [status.decode() for status in await self._run_durably("append", len(batches), *args)]

    async def cancel(self, job_id: str, reason: str = "") -> State:
        """End a queued or running job. Returns the state it is in now. Raises `UnknownJob`, `FleetUnavailable`."""
        async with translated():
            reply = await self._run("cancel", checked(job_id), reason)
        if reply[0] == b"gone":
            raise unknown(job_id)
        return cast("State", reply[-1].decode())

    async def begin(self, claim: Claim) -> AppendStatus:
        """Say that a job with one strike left runs now, alone: from here on a death is its own doing."""
        mark = Batch(claim.job_id, claim.epoch, claim.owner, claim.seq + 1, claim.tokens, [], {"parked": ""})
        return (await self.append([mark]))[0]

    async def release(self, claim: Claim, *, died: bool = False) -> str:
        """Hand a running job to the next worker; without a strike, unless its engine ``died`` under it."""
        how = "died" if died else "handover"
        return str((await self._run("release", claim.job_id, claim.epoch, claim.owner, how)).decode())

    async def serve(self, model: ServedModel, nonce: str, *, lease_ms: int = 3000, normal_gap_ms: int = 1500) -> str:
        """Register a served model and the leases' terms. Returns the data set's incarnation id."""
        reply = await self._run(
            "serve", model.name, self.keys.queue(model.name), msgspec.json.encode(model), nonce, lease_ms, normal_gap_ms
        )
        return str(reply.decode())

    async def give_back(self, job_id: str, worker: str, nonce: str | None = None) -> None:
        """Hand over a job that the ledger thinks this worker runs (under ``nonce``), and that it doesn't."""
        owner, epoch, runs_on = await self._db.hmget(self.keys.job(job_id), "owner", "epoch", "worker")
        if runs_on == worker.encode() and owner and nonce in (None, owner.decode()):
            await self._run("release", job_id, epoch, owner, "handover")

    async def lost(self, job_id: str, seq: int) -> None:
        """Say that event ``seq`` was read: if the log is shorter now, nobody may read other text in its place."""
        await self._run("lost", job_id, seq)

    async def bury(self, worker: str) -> tuple[int, int]:
        """Give a dead worker's jobs to others now. Returns how many were requeued and how many given up."""
        requeued, given_up = await self._run("bury", worker)
        return int(requeued), int(given_up)

    async def reap(self) -> Reaped:
        """The housekeeping that whoever watches a fleet does: dead workers, deadlines, lost messages."""
        r = await self._run("reap")
        return Reaped(int(r[0]), int(r[1]), int(r[2]), int(r[3]), int(r[4]), tuple(i.decode() for i in r[5:]))

    async def stored(self, job_id: str) -> Stored | None:
        """What was submitted; None for a job that is gone (or never was). Raises `FleetUnavailable`."""
        if not is_id(job_id):
            return None
        async with translated():
            model, state, request, shown, options, submitted_ms, epoch = await self._db.hmget(
                self.keys.job(job_id), "model", "state", "request", "shown", "options", "submitted_ms", "epoch"
            )
        if state is None:
            return None
        told = JobOptions.model_validate_json(options or b"{}")
        return Stored(
            model.decode(), cast("State", state.decode()), request, shown or b"", told, int(submitted_ms), int(epoch)
        )

    async def forget(self, job_id: str) -> bool:
        """Delete an ended job, log and all. False: it has not ended. Raises `FleetUnavailable`."""
        async with translated():
            return bool((await self._run("forget", checked(job_id)))[0] != b"running")

    async def poll(self, job_ids: Sequence[str]) -> list[Polled | None]:
        """State and last event of many jobs in one call; None for a job that is gone."""
        return [
            Polled(r[0].decode(), int(r[1]), int(r[2]) if int(r[2]) >= 0 else None) if r[0] else None
            for r in await self._run("poll", *job_ids)
        ]

    async def read(self, job_id: str, after: int, count: int = 1000) -> list[tuple[int, AnyEvent]]:
        """Events after the cursor ``after``, in order. Raises `LostState` for an entry that can't be read."""
        entries = await self._entries(job_id, after, count)
        try:
            return [(int(entry_id.split(b"-")[0]), decode(fields[b"e"])) for entry_id, fields in entries]
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            raise LostState(f"The log of job {job_id} holds something that is no event.") from error

    async def _entries(self, job_id: str, after: int, count: int) -> Any:
        if not self.replicas:
            return await self._db.xrange(self.keys.log(job_id), min=f"{after + 1}-0", count=count)
        pipe = self._db.pipeline(transaction=False)
        pipe.xrange(self.keys.log(job_id), min=f"{after + 1}-0", count=count)
        # Replication is one stream: who has a message sent after the read has all that was read. A message, since a
        # full Redis takes those too.
        pipe.publish(f"{self.keys.prefix}sync", b"")
        entries, _, has_it = await pipe.execute_command("WAIT", self.replicas, REPLICATION_MS).execute()
        if has_it < self.replicas:
            raise RedisConnectionError(f"{has_it} of {self.replicas} replicas have what was read")
        return entries

    async def models(self) -> dict[str, ServedModel]:
        async with translated():
            stored = await self._db.hgetall(self.keys.models)
        return {name.decode(): msgspec.json.decode(value, type=ServedModel) for name, value in stored.items()}

    async def workers(self) -> list[dict[str, str]]:
        """What the workers with a valid lease say of themselves; ``id`` and ``lease_ms`` (left) are added."""
        async with translated():
            seconds, micros = await self._db.time()
            now = seconds * 1000 + micros // 1000
            alive = await self._db.zrangebyscore(self.keys.workers, now, "+inf", withscores=True)
            pipe = self._db.pipeline(transaction=False)
            for worker, _ in alive:
                pipe.hgetall(self.keys.worker(worker.decode()))
            told = await pipe.execute()
        return [
            {"id": worker.decode(), "lease_ms": str(int(end) - now)} | {k.decode(): v.decode() for k, v in says.items()}
            for (worker, end), says in zip(alive, told, strict=True)
        ]

    async def status(self, job_id: str) -> JobStatus:
        """Raises `UnknownJob`, `FleetUnavailable`."""
        async with translated():
            stored = await self._db.hgetall(self.keys.job(checked(job_id)))
            if b"state" not in stored:
                raise unknown(job_id)
            f = {k.decode(): v for k, v in stored.items()}
            state, model = cast("State", f["state"].decode()), f["model"].decode()
            position, waiting = None, False
            if state == "queued":
                position = await self._db.zrank(self.keys.waiting(model), job_id)
                waiting = all(w.get("model") != model for w in await self.workers())

        def ms(name: str) -> int | None:
            return int(f[name]) if name in f else None

        options = JobOptions.model_validate_json(f.get("options", b"{}"))
        terminal = decode(f["terminal"]) if "terminal" in f else None
        return JobStatus(
            id=job_id,
            state=state,
            model=model,
            position=position,
            waiting_for_worker=waiting,
            attempts=int(f["epoch"]),
            strikes=int(f["strikes"]),
            events=int(f["seq"]),
            completion_tokens=int(f["tokens"]),
            worker=f["worker"].decode() or None,
            submitted_ms=int(f["submitted_ms"]),
            first_claimed_ms=ms("first_claimed_ms"),
            first_token_ms=ms("first_token_ms"),
            ended_ms=ms("ended_ms"),
            deadline_ms=int(f["deadline_ms"]),
            tags=options.tags,
            priority=options.priority,
            error=cast("ErrorBody | None", getattr(terminal, "error", None)),
        )


def checked(job_id: str) -> str:
    """Nothing that isn't an id ever becomes part of a key."""
    if not is_id(job_id):
        raise unknown(job_id)
    return job_id


def media_gone(refs: Sequence[str], hint: str = "") -> MediaGone:
    more = f" and {len(refs) - 1} more" if len(refs) > 1 else ""
    return MediaGone(
        f"The medium {refs[0][:12]}…{more} is not (or no longer) in the fleet's store.",
        hint=hint or "Send the request again, with the media themselves.",
        missing=list(refs[:16]),
    )


def unknown(job_id: str) -> UnknownJob:
    return UnknownJob(f"There is no job {job_id[:64]!r}.", hint="It never existed, or its retention is over.")
