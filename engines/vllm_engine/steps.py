"""The engine core's reports, taken a step at a time: all new tokens go to their mailboxes in one pass.

`AsyncLLM` makes an object and wakes a task for each token of each request. With hundreds of streams of a small model
that costs more than the step itself; here a reader who can't keep up finds several tokens when it comes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

from tokenfleet.engines import mailbox
from tokenfleet.engines.base import RawLogprob
from tokenfleet.engines.mailbox import Mailbox
from tokenfleet.wire.errors import EngineDead, EngineError

_SHARE = 4
"""Readers are woken so seldom that their first reaction takes no more than this part (1/4) of the loop's time; what
follows from it (detokenising, publishing) takes about as much again."""
_LONGEST_S = 0.1
"""A token waits no longer than this for its reader to be woken. With few streams it doesn't wait for the next step."""

_REASONS: dict[FinishReason, mailbox.FinishReason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "cancelled",
}


@dataclass(slots=True)
class _Reader:
    mailbox: Mailbox
    top_logprobs: int | None


class StepReader:
    """Reads one engine core, on the loop where it is started. All methods belong to that loop."""

    def __init__(self, core: Any) -> None:
        """``core``: a `vllm.v1.engine.core_client.AsyncMPClient` that nobody else reads from."""
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._readers: dict[str, _Reader] = {}
        self._rewards: dict[str, asyncio.Future[Any]] = {}
        self._unread: set[Mailbox] = set()
        self._is_resting = False
        self._failure: EngineDead | None = None
        self.steps = 0
        self._task = self._loop.create_task(self._read(), name="vllm-steps")
        self._task.add_done_callback(self._end)

    @property
    def failure(self) -> EngineDead | None:
        """Why no more steps can be read."""
        return self._failure

    @property
    def unfinished(self) -> int:
        """Requests that the core has not finished, and that nobody has closed."""
        return len(self._readers) + len(self._rewards)

    def open(self, request_id: str, top_logprobs: int | None) -> Mailbox:
        """Where the tokens of a request will lie; to be opened before the core gets it."""
        if self._failure is not None:
            raise self._failure
        box = Mailbox()
        self._readers[request_id] = _Reader(box, top_logprobs)
        return box

    def open_reward(self, request_id: str) -> asyncio.Future[Any]:
        """The pooled tensor of a request, when it is there."""
        if self._failure is not None:
            raise self._failure
        future = self._rewards[request_id] = self._loop.create_future()
        return future

    async def close(self, request_id: str) -> None:
        """Abort the request unless it is over."""
        is_reader = self._readers.pop(request_id, None) is not None
        is_reward = self._rewards.pop(request_id, None) is not None
        if (is_reader or is_reward) and self._failure is None:
            await self._core.abort_requests_async([request_id])

    def stop(self) -> None:
        """Read no more; who waits is told that the engine was closed."""
        self._task.cancel()

    async def _read(self) -> None:
        while True:
            report = await self._core.get_output_async()
            self.steps += 1
            for output in report.outputs:
                self._deliver(output)
            self._wake()

    def _deliver(self, output: Any) -> None:
        """``output``: a `vllm.v1.engine.EngineCoreOutput`. One of an unknown request was aborted."""
        reader = self._readers.get(output.request_id)
        if reader is None:
            self._deliver_reward(output)
            return
        ids, reason = output.new_token_ids, output.finish_reason
        logprobs: Iterable[RawLogprob] = ()
        if reader.top_logprobs is not None and ids:
            logprobs = _logprobs(ids, output.new_logprobs, reader.top_logprobs)
        if reason is None:
            if ids:
                reader.mailbox.add(ids, logprobs)
                self._unread.add(reader.mailbox)
            return
        del self._readers[output.request_id]
        if (known := _REASONS.get(reason)) is None:
            reader.mailbox.fail(EngineError(f"vLLM ended this request with {str(reason)!r}."))
        else:
            reader.mailbox.add(ids, logprobs, known)
            self._unread.add(reader.mailbox)

    def _deliver_reward(self, output: Any) -> None:
        future = self._rewards.pop(output.request_id, None)
        if future is None or future.done():
            return
        if output.pooling_output is None:
            future.set_exception(EngineError(f"vLLM ended this request with {str(output.finish_reason)!r}."))
        else:
            future.set_result(output.pooling_output)

    def _wake(self) -> None:
        if self._is_resting or not self._unread:
            return
        self._is_resting = True
        woken, self._unread = self._unread, set()
        started = self._loop.time()
        for box in woken:
            box.wake()
        self._loop.call_soon(self._rest, started)  # comes after the readers' own turn

    def _rest(self, started: float) -> None:
        took = self._loop.time() - started
        self._loop.call_at(started + min(_SHARE * took, _LONGEST_S), self._wake_again)

    def _wake_again(self) -> None:
        self._is_resting = False
        self._wake()

    def _end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._failure = EngineDead("The engine was closed.")
        else:
            cause = task.exception()
            is_death = isinstance(cause, EngineDeadError)
            reason = "vLLM's engine core has died." if is_death else f"vLLM's reports can't be read: {cause!r}"
            self._failure = EngineDead(reason, hint="Its reason is in the worker's log.")
            self._failure.__cause__ = cause
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.mailbox.fail(self._failure)
        rewards, self._rewards = self._rewards, {}
        for future in rewards.values():
            if not future.done():
                future.set_exception(self._failure)


def _logprobs(ids: Sequence[int], found: Any, count: int) -> Iterable[RawLogprob]:
    """``found``: `LogprobsLists`, arrays ``[len(ids), 1 + n]``: each token itself, then the best ones in order."""
    rows = zip(ids, found.logprob_token_ids.tolist(), found.logprobs.tolist(), strict=True)
    return [
        RawLogprob(token, values[0], tuple(itertools.islice(zip(others, values, strict=True), 1, count + 1)))
        for token, others, values in rows
    ]
