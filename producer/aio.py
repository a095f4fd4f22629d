"""The asynchronous client: submit jobs, follow their tokens, fetch results, cancel. `sync` has its blocking twin."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tokenfleet.producer import deadletters
from tokenfleet.producer.acceptance import Acceptance, unknown
from tokenfleet.producer.aio_job import AsyncJob
from tokenfleet.producer.collector import Collector
from tokenfleet.producer.deadletters import DeadLetter
from tokenfleet.producer.media import ARGUMENTS, Taken, has_media, take
from tokenfleet.producer.media_kinds import Kind
from tokenfleet.producer.media_sources import bytes_of
from tokenfleet.producer.overview import Overview, overview
from tokenfleet.wire import urls
from tokenfleet.wire.chat import ChatRequest, MediaPart, ScoreRequest
from tokenfleet.wire.errors import (
    FleetUnavailable,
    MediaGone,
    TokenfleetError,
    UnknownModel,
)
from tokenfleet.wire.events import AnyEvent
from tokenfleet.wire.jobs import JobOptions, ServedModel, dump_request
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Ledger, translated
from tokenfleet.wire.media import MediaSettings, MediaStore, media_entries
from tokenfleet.wire.requests import Messages, chat_request, check_size, score_request
from tokenfleet.wire.results import ChatResult

T = TypeVar("T")

MIN_REDIS, MIN_VALKEY = (7, 0), (7, 2)
_MEDIA = MediaSettings()
UNBOUNDED_TOKENS = 1024
"""What an answer without a limit is taken to come to."""


class AsyncClient:
    """A connection to a fleet. Use it as ``async with AsyncClient(url) as client``, from one event loop.

    ``model`` is the served model that jobs go to unless they name another; with one served model it may be left out.
    ``media`` bounds images, videos and audios, and says where large ones lie.
    Raises `FleetUnavailable` when Redis can't be reached, is too old, or may evict keys."""

    def __init__(
        self,
        redis_url: str,
        *,
        fleet: str = "default",
        model: str | None = None,
        max_queued: int = 100_000,
        media: MediaSettings = _MEDIA,
    ) -> None:
        self.keys = Keys(fleet)
        self.redis_url = redis_url
        self._model = model
        self._max_queued = max_queued
        self._redis = urls.connect_async(redis_url, socket_timeout=10.0, socket_connect_timeout=3.0)
        self.ledger = Ledger(self._redis, self.keys, replicas=urls.parse(redis_url).replicas)
        self.media = MediaStore(self._redis, self.keys, media)
        self._acceptance = Acceptance(self.ledger)
        self._collecting: Collector | None = None
        self._is_checked = False
        self._background: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """Its own, which `aclose` ends in their order."""
        return self._background | (self._collecting.tasks if self._collecting is not None else set())

    async def aclose(self) -> None:
        if self._collecting is not None:
            self._collecting.fail_all()  # readers' last acts come before what closes the connections
            await asyncio.sleep(0)
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.media.aclose()
        if self._collecting is not None:
            await self._collecting.close()
        await self._redis.aclose()

    async def submit(self, messages: Messages = (), *, job_id: str | None = None, **named: Any) -> AsyncJob:
        """Queue a chat and return at once.

        ``messages`` is a list of messages, or a string: one user message. All else by name: ``model``; of the request
        (system, tools, adapter, enable_thinking, …), of the job (priority, tags, deadline_s, queue_ttl_s, retention_s,
        countdown or eta, durable, …), and generation parameters (temperature, max_new_tokens, …). The same ``job_id``
        with the same body is the same job. Raises `InvalidRequest`, `UnknownModel`, `Overloaded`, `JobConflict`.

        ``images``, ``videos`` and ``audios`` are lists of paths, bytes, data URLs, file objects, PIL images or arrays
        of samples; they stand where the texts say ``<image>``, ``<video>``, ``<audio>``, or before the first message.
        OpenAI's content parts do as well (docs/media.md)."""
        model = named.pop("model", None)
        taken = await self._taken(messages, named)
        request, options = chat_request(taken.messages, named)
        return await self._submit(request, options, model, job_id, media=taken.media)

    async def submit_request(
        self,
        request: ChatRequest | ScoreRequest,
        options: JobOptions,
        *,
        model: str | None,
        job_id: str | None = None,
        shown: bytes = b"",
        media: Mapping[str, bytes] | None = None,
    ) -> AsyncJob:
        """`submit`, for a request that is built already (a gateway's, a batch's).

        ``shown`` is kept as long as the job, for whoever shows it again (`Ledger.stored`). ``media`` by sha256: what of
        its media parts is perhaps not stored yet."""
        return await self._submit(request, options, model, job_id, shown=shown, media=media)

    async def upload(self, kind: Kind, source: Any, *, tenant: str = "") -> MediaPart:
        """Store one medium; the part names it in messages for some minutes (`MediaSettings.upload_ttl_s`), and for as
        long as a job needs it."""
        data = await asyncio.to_thread(bytes_of, kind, source, kind, self.media.settings, may_be_path=True)
        ref = hashlib.sha256(data).hexdigest()
        await self.media.offer(tenant, {ref: data})
        return MediaPart(type=kind, ref=ref)

    async def submit_scores(self, texts: Sequence[str], *, job_id: str | None = None, **named: Any) -> AsyncJob:
        """Queue texts to be scored by a reward model; ``result().scores`` has one number each."""
        model = named.pop("model", None)
        request, options = score_request(texts, named)
        return await self._submit(request, options, model, job_id)

    async def chat(self, messages: Messages = (), **named: Any) -> ChatResult:
        """`submit`, and wait for the whole answer. Cancelled meanwhile, it leaves no job that has neither a ``job_id``
        of the caller's, by which to come back, nor a ``webhook``."""
        return await (await self.submit(messages, **_for_the_caller_alone(named))).result()

    async def scores(self, texts: Sequence[str], **named: Any) -> ChatResult:
        """`submit_scores`, and wait for the scores; see `chat`."""
        return await (await self.submit_scores(texts, **_for_the_caller_alone(named))).result()

    async def submit_many(self, chats: Iterable[Messages | Mapping[str, Any]], **named: Any) -> list[AsyncJob]:
        """Queue many chats; each is messages, or a mapping of `submit`'s arguments that overrides ``named``. If one is
        refused, those queued before it are cancelled, unless they have a ``job_id`` of the caller's."""
        calls = []
        # All are validated before the first is queued.
        for chat in chats:
            call = {**named, **chat} if isinstance(chat, Mapping) else {**named, "messages": chat}
            model, job_id = call.pop("model", None), call.pop("job_id", None)
            taken = await self._taken(call.pop("messages", ()), call)
            calls.append((*chat_request(taken.messages, call), model, job_id, taken.media))
        jobs: list[AsyncJob] = []
        queued: list[AsyncJob] = []  # of these, as soon as each is

        async def queue(call: Any, media: Mapping[str, bytes] | None) -> AsyncJob:
            queued.append(job := await self._submit(*call, media=media))
            return job

        try:
            for start in range(0, len(calls), 64):
                some = [queue(call, media) for *call, media in calls[start : start + 64]]
                for done in await asyncio.gather(*some, return_exceptions=True):
                    if isinstance(done, BaseException):
                        raise done
                    jobs.append(done)
        except BaseException:  # the caller gets none of them
            giving_up = [self._in_background(job._unclaimed()) for job in queued]
            await asyncio.shield(asyncio.gather(*giving_up, return_exceptions=True))
            raise
        return jobs

    def job(self, job_id: str, *, cancel_on_disconnect: bool = False) -> AsyncJob:
        """A job that was submitted elsewhere."""
        return AsyncJob(self, job_id, cancel_on_disconnect=cancel_on_disconnect)

    async def events(self, job_id: str, after: int = 0, count: int = 1000) -> list[tuple[int, AnyEvent]]:
        """What a job's log has now after a cursor, without following it. Raises `LostState`, `FleetUnavailable`."""
        async with translated():
            return await self.ledger.read(job_id, after, count)

    async def models(self) -> dict[str, ServedModel]:
        return await self.ledger.models()

    async def workers(self) -> list[dict[str, str]]:
        """What the live workers say of themselves."""
        return await self.ledger.workers()

    async def overview(self) -> Overview:
        """Models, workers, queues and memory at a glance."""
        return await overview(self.ledger)

    async def dead_letters(self) -> list[DeadLetter]:
        """The jobs that were given up because worker after worker died under them, oldest first."""
        return await deadletters.dead_letters(self.ledger)

    async def dead_letter(self, job_id: str) -> DeadLetter:
        """A failed job with its payload. Raises `UnknownJob`, `InvalidRequest`."""
        return await deadletters.dead_letter(self.ledger, job_id)

    async def requeue(self, job_id: str) -> AsyncJob:
        """Queue a failed job's request again, as a new job with ``retry_of``. Raises what `submit` raises."""
        return AsyncJob(self, await deadletters.requeue(self.ledger, job_id, max_queued=self._max_queued))

    async def check(self) -> None:
        """Raises `FleetUnavailable` if this Redis can't hold a fleet."""
        async with translated():
            info = await self._redis.info()
        name, floor = ("Valkey", MIN_VALKEY) if "valkey_version" in info else ("Redis", MIN_REDIS)
        version = str(info.get("valkey_version") or info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < floor:
            raise FleetUnavailable(
                f"{name} {version} is too old.", code="redis_too_old", hint=f"{floor[0]}.{floor[1]} or newer is needed."
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise FleetUnavailable(
                f"Redis may evict keys (maxmemory-policy {policy}), so it could lose jobs.",
                code="wrong_eviction_policy",
                hint="Set maxmemory-policy noeviction.",
            )
        self._is_checked = True

    def _in_background(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that outlives its caller, until the client is closed."""
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _taken(self, messages: Messages, named: dict[str, Any]) -> Taken:
        """The media out of both; ``named`` has none after this."""
        if not has_media(messages, named):
            taken = Taken(messages)
        else:
            taken = await asyncio.to_thread(take, messages, dict(named), self.media.settings)
        for name in ARGUMENTS:
            named.pop(name, None)
        return taken

    async def _submit(
        self,
        request: ChatRequest | ScoreRequest,
        options: JobOptions,
        model: str | None,
        job_id: str | None,
        *,
        shown: bytes = b"",
        media: Mapping[str, bytes] | None = None,
    ) -> AsyncJob:
        if not self._is_checked:
            await self.check()
        body = dump_request(request)
        check_size(body)
        is_named, job_id = job_id is not None, job_id or new_id()
        model = model or self._model or await self._only_model()
        await self._acceptance.check(request, model)
        entries = media_entries(options.tenant, request)
        for is_last_try in (False, True):
            if media:
                await self.media.offer(options.tenant, media)
            try:
                submitting = self.ledger.submit(
                    job_id, model, body, options, max_queued=self._max_queued, shown=shown, media=entries,
                    tokens=estimated_tokens(request, body),
                )  # fmt: skip
                is_lost_without_us = options.cancel_on_disconnect or not is_named
                await (self._or_take_back(submitting, job_id) if is_lost_without_us else submitting)
                break
            except UnknownModel:
                raise unknown(model, await self.models()) from None
            except MediaGone as error:
                # Gone between upload and submit: once more, if it is ours.
                if is_last_try or not media or not media.keys() >= set(error.details["missing"]):
                    raise
        return AsyncJob(self, job_id, cancel_on_disconnect=options.cancel_on_disconnect, is_named=is_named)

    async def _or_take_back(self, submitting: Coroutine[Any, Any, Any], job_id: str) -> None:
        """Submit; whoever is cancelled meanwhile, and never gets the job, leaves none."""
        task = self._in_background(submitting)

        async def take_back() -> None:
            with contextlib.suppress(TokenfleetError):
                await task
                await self.ledger.cancel(job_id, "the submitter left")

        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.shield(self._in_background(take_back()))
            raise

    async def _only_model(self) -> str:
        models = await self.models()
        # The registry remembers what a fleet once served; what has a worker now is what is meant.
        served = models if len(models) == 1 else {worker.get("model", "") for worker in await self.workers()}
        if len(served) == 1:
            self._model = next(iter(served))
            return self._model
        known = ", ".join(sorted(models)) or "none yet"
        raise UnknownModel("Which model? The fleet serves not exactly one.", hint=f"Served models: {known}.")

    async def _collector(self) -> Collector:
        if self._collecting is None:
            self._collecting = Collector(self.ledger)
        return self._collecting


def _for_the_caller_alone(named: Mapping[str, Any]) -> dict[str, Any]:
    is_for_others = named.get("job_id") is not None or bool(named.get("webhook"))
    return {"cancel_on_disconnect": not is_for_others, **named}


def estimated_tokens(request: ChatRequest | ScoreRequest, body: bytes) -> int:
    """What a job may come to, before anything has counted: a token for four bytes of the request, and all that may be
    written."""
    if isinstance(request, ScoreRequest):
        return len(body) // 4
    most = request.params.max_new_tokens
    return len(body) // 4 + request.params.n * (UNBOUNDED_TOKENS if most is None else most)
