"""The blocking client: the asynchronous one, run by a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.aio_job import AsyncJob, AsyncStream, piece_of, raise_for
from tokenfleet.producer.deadletters import DeadLetter
from tokenfleet.producer.media_kinds import Kind
from tokenfleet.producer.overview import Overview
from tokenfleet.producer.reading import ChoiceReader
from tokenfleet.wire.chat import ChatRequest, MediaPart, ScoreRequest
from tokenfleet.wire.events import AnyEvent
from tokenfleet.wire.jobs import JobOptions, JobStatus, ServedModel, State
from tokenfleet.wire.media import MediaSettings
from tokenfleet.wire.requests import Messages
from tokenfleet.wire.results import ChatResult
from tokenfleet.wire.toolcalls import ParsedDelta

T = TypeVar("T")
_UNDONE_S = 2.0
"""What a cancelled call may take to undo what it has begun: a job that nobody would get, say."""


class LoopThread:
    """An event loop in a daemon thread. `run` waits for a coroutine on it, and cancels it on Ctrl-C; it raises once the
    coroutine has ended (or after `_UNDONE_S`): the process may end next, and this thread with it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="tokenfleet-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Raises `RuntimeError` if the loop is closed, before or meanwhile."""
        future: concurrent.futures.Future[T] | None = None
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("This client was closed by another thread.") from None
        except BaseException as error:
            if future is None and isinstance(error, RuntimeError):
                coroutine.close()
                raise RuntimeError("This client is closed.") from None
            if future is None or not future.done():
                self._undone(coroutine).result()
            raise

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run`, awaited from another event loop."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.wrap_future(self._undone(coroutine)))
            raise

    async def finish(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`arun` for what must not be cut short: it goes on if whoever awaits it is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop)))

    def _undone(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[None]:
        """Cancel it, and have it end. By the coroutine, not by its future: Ctrl-C may come before we have that."""

        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task.get_coro() is coroutine]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_UNDONE_S)
            else:
                coroutine.close()  # it never began, or has ended

        return asyncio.run_coroutine_threadsafe(cancel(), self.loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self.run(_nothing_left())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _nothing_left(but: Iterable[asyncio.Task[Any]] = ()) -> None:
    """Cancel what runs on this loop, wait until it has ended, and let the sockets that it closed leave the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()} - set(but)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # a transport closes its socket in the loop's next round


class JobStream:
    """A job's events from a cursor on: an iterator and a context manager; see `AsyncStream`."""

    def __init__(self, thread: LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream
        self._batch: list[tuple[int, AnyEvent]] = []
        self.cursor = stream.cursor

    def __enter__(self) -> Self:
        try:
            self._thread.run(self._stream.__aenter__())
        except BaseException:  # Ctrl-C as it was done: the block that would have left it is never entered
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._thread.run(self._stream.aclose())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnyEvent:
        if not self._batch:
            # All that is there in one go: one change of threads for many tokens.
            self._batch = self._thread.run(self._stream.next_batch())[::-1]
        if not self._batch:
            raise StopIteration
        self.cursor, event = self._batch.pop()
        return event

    def text(self, choice: int = 0) -> Generator[str, None, None]:
        """The text of one choice, piece by piece. Raises the job's error if it does not finish."""
        for event in self:
            if piece := piece_of(event, choice):
                yield piece

    def parsed(self, choice: int = 0) -> Generator[ParsedDelta, None, None]:
        """One choice as it is written, taken apart; see `AsyncStream.parsed`."""
        reader = ChoiceReader(self._stream.job_id, choice, self.cursor)
        for event in self:
            yield from reader.add(event)
            raise_for(event)


class Job:
    """A submitted job; see `AsyncJob`."""

    def __init__(self, thread: LoopThread, job: AsyncJob) -> None:
        self._thread = thread
        self._job = job

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    @classmethod
    def from_id(cls, job_id: str, client: Client) -> Job:
        """A job that was submitted elsewhere: the same as ``client.job(job_id)``."""
        return client.job(job_id)

    @property
    def id(self) -> str:
        return self._job.id

    def stream(self, after: int = 0) -> JobStream:
        """Events after the cursor ``after`` (0: from the start), from any number of readers, at any time."""
        return JobStream(self._thread, self._job.stream(after))

    def text(self, choice: int = 0) -> Generator[str, None, None]:
        """The answer's text as it is written."""
        with self.stream() as stream:
            yield from stream.text(choice)

    def parsed(self, choice: int = 0) -> Generator[ParsedDelta, None, None]:
        """The answer as it is written, taken apart into content, thoughts and tool calls."""
        with self.stream() as stream:
            yield from stream.parsed(choice)

    def result(self, timeout: float | None = None) -> ChatResult:
        """Wait for the whole answer. Raises the job's error, or `TimeoutError` after ``timeout`` seconds."""
        return self._thread.run(self._job.result(timeout))

    def cancel(self, reason: str = "") -> State:
        """End the job, queued or running. Returns its state: ``cancelled``, or how it had ended before."""
        return self._thread.run(self._job.cancel(reason))

    def status(self) -> JobStatus:
        return self._thread.run(self._job.status())


class Client:
    """A connection to a fleet, usable from any thread; see `AsyncClient` for its arguments."""

    def __init__(
        self,
        redis_url: str,
        *,
        fleet: str = "default",
        model: str | None = None,
        max_queued: int = 100_000,
        media: MediaSettings | None = None,
    ) -> None:
        self.thread = LoopThread()
        try:
            self.aio = self.thread.run(_made(redis_url, fleet, model, max_queued, media or MediaSettings()))
        except BaseException:
            self.thread.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self.thread.loop.is_closed():
            self.thread.run(self._aclose())
            self.thread.close()

    async def _aclose(self) -> None:
        # Other threads' calls first: what they ask for after the end of the pool opens connections that nobody closes.
        await _nothing_left(but=self.aio.tasks)
        await self.aio.aclose()

    def submit(self, messages: Messages = (), *, job_id: str | None = None, **named: Any) -> Job:
        """Queue a chat and return at once; see `AsyncClient.submit`."""
        return self._job(lambda: self.aio.submit(messages, job_id=job_id, **named))

    def submit_request(
        self,
        request: ChatRequest | ScoreRequest,
        options: JobOptions,
        *,
        model: str | None,
        job_id: str | None = None,
        shown: bytes = b"",
        media: Mapping[str, bytes] | None = None,
    ) -> Job:
        """`submit`, for a request that is built already; see `AsyncClient.submit_request`."""
        more: dict[str, Any] = {"model": model, "job_id": job_id, "shown": shown, "media": media}
        return self._job(lambda: self.aio.submit_request(request, options, **more))

    def upload(self, kind: Kind, source: Any, *, tenant: str = "") -> MediaPart:
        """Store one medium; the part names it in messages. See `AsyncClient.upload`."""
        return self.thread.run(self.aio.upload(kind, source, tenant=tenant))

    def submit_scores(self, texts: Sequence[str], *, job_id: str | None = None, **named: Any) -> Job:
        """Queue texts to be scored by a reward model."""
        return self._job(lambda: self.aio.submit_scores(texts, job_id=job_id, **named))

    def chat(self, messages: Messages = (), **named: Any) -> ChatResult:
        """`submit`, and wait for the whole answer."""
        return self.thread.run(self.aio.chat(messages, **named))

    def scores(self, texts: Sequence[str], **named: Any) -> ChatResult:
        """`submit_scores`, and wait for the scores."""
        return self.thread.run(self.aio.scores(texts, **named))

    def submit_many(self, chats: Iterable[Messages | Mapping[str, Any]], **named: Any) -> list[Job]:
        """Queue many chats; see `AsyncClient.submit_many`."""
        return self._jobs(lambda: self.aio.submit_many(chats, **named))

    def job(self, job_id: str, *, cancel_on_disconnect: bool = False) -> Job:
        """A job that was submitted elsewhere."""
        return Job(self.thread, self.aio.job(job_id, cancel_on_disconnect=cancel_on_disconnect))

    def events(self, job_id: str, after: int = 0, count: int = 1000) -> list[tuple[int, AnyEvent]]:
        """What a job's log has now after a cursor, without following it. Raises `LostState`, `FleetUnavailable`."""
        return self.thread.run(self.aio.events(job_id, after, count))

    def models(self) -> dict[str, ServedModel]:
        return self.thread.run(self.aio.models())

    def workers(self) -> list[dict[str, str]]:
        return self.thread.run(self.aio.workers())

    def overview(self) -> Overview:
        """Models, workers, queues and memory at a glance."""
        return self.thread.run(self.aio.overview())

    def dead_letters(self) -> list[DeadLetter]:
        """The jobs that were given up because worker after worker died under them, oldest first."""
        return self.thread.run(self.aio.dead_letters())

    def dead_letter(self, job_id: str) -> DeadLetter:
        """A failed job with its payload. Raises `UnknownJob`, `InvalidRequest`."""
        return self.thread.run(self.aio.dead_letter(job_id))

    def requeue(self, job_id: str) -> Job:
        """Queue a failed job's request again, as a new job with ``retry_of``. Raises what `submit` raises."""
        return self._job(lambda: self.aio.requeue(job_id))

    def check(self) -> None:
        self.thread.run(self.aio.check())

    def _job(self, submit: Callable[[], Coroutine[Any, Any, AsyncJob]]) -> Job:
        async def submitted() -> list[AsyncJob]:
            return [await submit()]

        return self._jobs(submitted)[0]

    def _jobs(self, submit: Callable[[], Coroutine[Any, Any, list[AsyncJob]]]) -> list[Job]:
        jobs: list[AsyncJob] = []

        async def submitted() -> None:
            jobs.extend(await submit())

        try:
            self.thread.run(submitted())
        except BaseException:  # Ctrl-C just as it was done: the caller gets none of them
            for job in jobs:
                self.thread.run(job._unclaimed())
            raise
        return [Job(self.thread, job) for job in jobs]


async def _made(redis_url: str, fleet: str, model: str | None, max_queued: int, media: MediaSettings) -> AsyncClient:
    """The asynchronous client, made on its own loop and checked."""
    client = AsyncClient(redis_url, fleet=fleet, model=model, max_queued=max_queued, media=media)
    try:
        await client.check()
    except BaseException:
        await client.aclose()
        raise
    return client
