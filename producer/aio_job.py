"""A submitted job and its events, for asyncio. `aio` has the client that submits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tokenfleet.producer.assembly import Assembly
from tokenfleet.producer.collector import Follower, is_terminal
from tokenfleet.producer.reading import ChoiceReader
from tokenfleet.wire.errors import (
    JobCancelled,
    JobExpired,
    TokenfleetError,
    from_body,
)
from tokenfleet.wire.events import AnyEvent, Cancelled, Delta, Expired, Failed
from tokenfleet.wire.jobs import JobStatus, State
from tokenfleet.wire.results import ChatResult
from tokenfleet.wire.toolcalls import ParsedDelta

if TYPE_CHECKING:
    from tokenfleet.producer.aio import AsyncClient


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
        try:
            await self._begin()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def _begin(self) -> None:
        if self._follower is None and not self._ended:
            collector = await self._job._client._collector()
            self._follower = await self._context.enter_async_context(collector.follow(self._job.id, self._after))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except TokenfleetError:
            if error is None:  # else that says more
                raise

    async def aclose(self) -> None:
        """Leave it; also one that was never begun."""
        is_early, self._ended, self._follower = not self._ended, True, None
        await self._context.aclose()
        if is_early:
            await self._job._left()

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
            await self._begin()  # cancelled here, it can be asked again
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

    def __init__(
        self, client: AsyncClient, job_id: str, *, cancel_on_disconnect: bool = False, is_named: bool = True
    ) -> None:
        self.id = job_id
        self._client = client
        self._cancel_on_disconnect = cancel_on_disconnect
        self._is_named = is_named
        """By its submitter, who could come back to it without having got it."""

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

    async def _left(self) -> None:
        """Its submitter reads no more."""
        if self._cancel_on_disconnect:
            # A task of its own: the reader may have been cancelled, and its scope may cancel at every await (anyio's).
            await asyncio.shield(self._client._in_background(self.cancel("the reader left")))

    async def _unclaimed(self) -> None:
        """Its submitter never got it: something else failed, or he was cancelled."""
        if self._cancel_on_disconnect or not self._is_named:
            await asyncio.shield(self._client._in_background(self.cancel("the submitter left")))


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
