"""The asynchronous client: submit jobs, follow their tokens, fetch results, cancel. `sync` has its blocking twin."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tokenfleet.producer import deadletters
from tokenfleet.producer.acceptance import Acceptance, unknown
from tokenfleet.producer.assembly import Assembly
from tokenfleet.producer.collector import Collector, Follower, is_terminal
from tokenfleet.producer.deadletters import DeadLetter
from tokenfleet.producer.media import ARGUMENTS, Taken, has_media, take
from tokenfleet.producer.media_kinds import Kind
from tokenfleet.producer.media_sources import bytes_of
from tokenfleet.producer.overview import Overview, overview
from tokenfleet.producer.reading import ChoiceReader
from tokenfleet.wire import urls
from tokenfleet.wire.chat import ChatRequest, MediaPart, ScoreRequest
from tokenfleet.wire.errors import (
    FleetUnavailable,
    JobCancelled,
    JobExpired,
    MediaGone,
    UnknownModel,
    from_body,
)
from tokenfleet.wire.events import AnyEvent, Cancelled, Delta, Expired, Failed
from tokenfleet.wire.jobs import JobOptions, JobStatus, ServedModel, State, dump_request
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Ledger, translated
from tokenfleet.wire.media import MediaSettings, MediaStore, media_entries
from tokenfleet.wire.requests import Messages, chat_request, check_size, score_request
from tokenfleet.wire.results import ChatResult
from tokenfleet.wire.toolcalls import ParsedDelta

T = TypeVar("T")

MIN_REDIS, MIN_VALKEY = (7, 0), (7, 2)
_MEDIA = MediaSettings()
UNBOUNDED_TOKENS = 1024
"""What an answer without a limit is taken to come to."""


class AsyncStream:
    """A job's events from a cursor on: an async iterator and a context manager.

    Iterate it for typed events, or `text` for text pieces only. ``cursor`` is the last event's seq: hand it to
    `AsyncJob.stream` (here or in another process) to go on from there. Leaving it early costs the job nothing, unless
    the job was submitted with ``cancel_on_disconnect``."""

    def __init__(self, job: AsyncJob, after: int) -> None:
        self._job = job
        self._after = after
        self._context = contextlib.AsyncExitStack()
        self._follower: Follower | None = None
        self._batch: list[tuple[int, AnyEvent]] = []
        self._ended = False
        self.cursor = after

    @property
    def job_id(self) -> str:
        return self._job.id

    async def __aenter__(self) -> Self:
        if self._follower is None and not self._ended:
            collector = await self._job._client._collector()
            self._follower = await self._context.enter_async_context(collector.follow(self._job.id, self._after))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        follower, self._follower = self._follower, None
        await self._context.aclose()
        if follower is not None and not self._ended and self._job._cancel_on_disconnect:
            self._ended = True
            # A task of its own: the reader may have been cancelled, and its scope may cancel at every await (anyio's).
            await asyncio.shield(self._job._client._in_background(self._job.cancel("the reader left")))
        self._ended = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyEvent:
        if not self._batch:
            self._batch = (await self.next_batch())[::-1]
        if not self._batch:
            raise StopAsyncIteration
        self.cursor, event = self._batch.pop()
        return event

    async def next_batch(self) -> list[tuple[int, AnyEvent]]:
        """All events that are there now, waiting for one; empty after the terminal one."""
        if self._ended:
            return []
        if self._follower is None:
            await self.__aenter__()
        assert self._follower is not None
        batch = await self._follower.next_batch()
        if is_terminal(batch[-1][1]):
            self._ended = True
            await self.aclose()
        return batch

    async def text(self, choice: int = 0) -> AsyncGenerator[str, None]:
        """The text of one choice, piece by piece. Raises the job's error if it does not finish."""
        async for event in self:
            if piece := piece_of(event, choice):
                yield piece

    async def parsed(self, choice: int = 0) -> AsyncGenerator[ParsedDelta, None]:
        """One choice as it is written, taken apart: `ContentDelta`, `ReasoningDelta`, `ToolCallDelta` (wire.toolcalls).
        Raises the job's error if it does not finish, `InvalidRequest` for a stream that began after the job did."""
        reader = ChoiceReader(self.job_id, choice, self.cursor)
        async for event in self:
            for delta in reader.add(event):
                yield delta
            raise_for(event)


class AsyncJob:
    """A submitted job. Its ``id`` is all that another process needs: ``client.job(id)``."""

    def __init__(self, client: AsyncClient, job_id: str, *, cancel_on_disconnect: bool = False) -> None:
        self.id = job_id
        self._client = client
        self._cancel_on_disconnect = cancel_on_disconnect

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def stream(self, after: int = 0) -> AsyncStream:
        """Events after the cursor ``after`` (0: from the start), from any number of readers, at any time."""
        return AsyncStream(self, after)

    async def text(self, choice: int = 0) -> AsyncGenerator[str, None]:
        """The answer's text as it is written."""
        async with self.stream() as stream, contextlib.aclosing(stream.text(choice)) as pieces:
            async for piece in pieces:
                yield piece

    async def parsed(self, choice: int = 0) -> AsyncGenerator[ParsedDelta, None]:
        """The answer as it is written, taken apart into content, thoughts and tool calls."""
        async with self.stream() as stream, contextlib.aclosing(stream.parsed(choice)) as deltas:
            async for delta in deltas:
                yield delta

    async def result(self, timeout: float | None = None) -> ChatResult:
        """Wait for the whole answer. Raises the job's error, or `TimeoutError` after ``timeout`` seconds (the job goes
        on)."""
        assembly = Assembly(self.id)
        async with asyncio.timeout(timeout), self.stream() as stream:
            while batch := await stream.next_batch():
                for _, event in batch:
                    assembly.add(event)
        assert assembly.terminal is not None
        raise_for(assembly.terminal)
        return assembly.result()

    async def cancel(self, reason: str = "") -> State:
        """End the job, queued or running. Returns its state: ``cancelled``, or how it had ended before."""
        return await self._client.ledger.cancel(self.id, reason)

    async def status(self) -> JobStatus:
        return await self._client.ledger.status(self.id)


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
        """`submit`, and wait for the whole answer."""
        return await (await self.submit(messages, **named)).result()

    async def scores(self, texts: Sequence[str], **named: Any) -> ChatResult:
        """`submit_scores`, and wait for the scores."""
        return await (await self.submit_scores(texts, **named)).result()

    async def submit_many(self, chats: Iterable[Messages | Mapping[str, Any]], **named: Any) -> list[AsyncJob]:
        """Queue many chats; each is messages, or a mapping of `submit`'s arguments that overrides ``named``."""
        calls = []
        # All are validated before the first is queued.
        for chat in chats:
            call = {**named, **chat} if isinstance(chat, Mapping) else {**named, "messages": chat}
            model, job_id = call.pop("model", None), call.pop("job_id", None)
            taken = await self._taken(call.pop("messages", ()), call)
            calls.append((*chat_request(taken.messages, call), model, job_id, taken.media))
        jobs: list[AsyncJob] = []
        for start in range(0, len(calls), 64):
            jobs += await asyncio.gather(
                *(self._submit(*call, media=media) for *call, media in calls[start : start + 64])
            )
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
        job_id = job_id or new_id()
        model = model or self._model or await self._only_model()
        await self._acceptance.check(request, model)
        entries = media_entries(options.tenant, request)
        for is_last_try in (False, True):
            if media:
                await self.media.offer(options.tenant, media)
            try:
                await self.ledger.submit(
                    job_id, model, body, options, max_queued=self._max_queued, shown=shown, media=entries,
                    tokens=estimated_tokens(request, body),
                )  # fmt: skip
                break
            except UnknownModel:
                raise unknown(model, await self.models()) from None
            except MediaGone as error:
                # Gone between upload and submit: once more, if it is ours.
                if is_last_try or not media or not media.keys() >= set(error.details["missing"]):
                    raise
        return AsyncJob(self, job_id, cancel_on_disconnect=options.cancel_on_disconnect)

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


def estimated_tokens(request: ChatRequest | ScoreRequest, body: bytes) -> int:
    """What a job may come to, before anything has counted: a token for four bytes of the request, and all that may be
    written."""
    if isinstance(request, ScoreRequest):
        return len(body) // 4
    most = request.params.max_new_tokens
    return len(body) // 4 + request.params.n * (UNBOUNDED_TOKENS if most is None else most)


def piece_of(event: AnyEvent, choice: int = 0) -> str:
    """The text that an event adds to one choice. Raises what a terminal event says, unless the job finished."""
    if isinstance(event, Delta):
        return event.text if event.choice == choice else ""
    raise_for(event)
    return ""


def raise_for(event: AnyEvent) -> None:
    """Raise what a terminal event says, unless the job finished."""
    match event:
        case Failed(error=body):
            raise from_body(body)
        case Expired(error=body):
            raise JobExpired(body.message, hint=body.hint, **body.details)
        case Cancelled(reason=reason):
            raise JobCancelled(f"The job was cancelled{': ' + reason if reason else ''}.")
        case _:
            pass
