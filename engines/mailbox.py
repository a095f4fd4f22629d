"""Where an engine's step loop leaves a sequence's tokens until its reader comes: whatever waits is one chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Literal

from tokenfleet.engines.base import RawLogprob, TokenChunk
from tokenfleet.wire.errors import TokenfleetError

FinishReason = Literal["stop", "length", "cancelled"]


class Mailbox:
    """One writer, one reader, both on the event loop's thread. Unbounded: max_new_tokens bounds what can lie in it."""

    __slots__ = ("_error", "_ids", "_logprobs", "_reason", "_waiter")

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._logprobs: list[RawLogprob] = []
        self._reason: FinishReason | None = None
        self._error: TokenfleetError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, ids: Iterable[int], logprobs: Iterable[RawLogprob] = (), reason: FinishReason | None = None) -> None:
        """Add tokens, and a logprob for each if they are wanted. With a ``reason`` they are the last ones."""
        self.add(ids, logprobs, reason)
        self.wake()

    def add(self, ids: Iterable[int], logprobs: Iterable[RawLogprob] = (), reason: FinishReason | None = None) -> None:
        """As `put`, but a reader who waits is not told before `wake`."""
        self._ids += ids
        self._logprobs += logprobs
        self._reason = reason

    def fail(self, error: TokenfleetError) -> None:
        """The reader gets what waits, then the error."""
        self._error = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> TokenChunk:
        """All that waits, as soon as there is something. Nothing may be taken after a chunk with a finish reason."""
        while not self._ids and self._reason is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk = TokenChunk(tuple(self._ids), tuple(self._logprobs), self._reason)
        self._ids, self._logprobs = [], []
        return chunk
