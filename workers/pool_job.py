"""One message while the pool has it: Celery's own tracer in a greenlet, the task's coroutine on the event loop.

The tracer is synchronous code. It runs in a greenlet on the loop's thread; whenever the coroutine of an ``async def``
task awaits something, the greenlet hands that awaitable to its asyncio task and is resumed with the outcome (as
SQLAlchemy's asyncio bridge does it, but with the coroutine inside the greenlet: so Celery's greenlet-local request and
current task are right in it). Retries, acks, results, signals, on_failure: all Celery's code, unchanged.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from tokenfleet.workers.pool import AsyncioPool

logger = logging.getLogger(__name__)

_running: ContextVar[tuple[Task, Any] | None] = ContextVar("tokenfleet_running_task", default=None)


class AsyncTask(Task):
    """Base class for ``async def`` tasks whose helpers (child asyncio tasks, `asyncio.to_thread`) use ``self.request``.

    In the coroutine itself ``self.request`` works with any base class.
    """

    abstract = True

    @property
    def request(self) -> Any:
        running = _running.get()
        if self.request_stack.top is None and running is not None and running[0] is self:
            return running[1]
        return self._get_request()


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):
    """What a coroutine sees at its soft time limit: Celery's exception, and a cancellation to asyncio, so that task
    groups and engines clean up behind it. Celery itself gets a plain `SoftTimeLimitExceeded`."""


class Stopped(BaseException):
    """Unwinds the tracer of a job that was revoked, or ran into its hard limit: Celery has recorded its end already."""


@dataclass(slots=True)
class Call:
    """What Celery hands to a pool for one message; the callbacks belong to the hub's thread."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on_accepted: Callable[[int, float], object]
    on_result: Callable[[Any], object]
    on_error: Callable[[ExceptionInfo], object]
    on_timeout: Callable[[bool, float], object]
    soft_limit_s: float | None = None
    hard_limit_s: float | None = None


class Job:
    """A plain ``def`` task's run, in a thread. Celery's request refers to it weakly and may `terminate` it."""

    def __init__(self, pool: AsyncioPool, call: Call) -> None:
        self.pool = pool
        self.call = call
        self.is_accepted = False
        self.is_over = False
        self.report: tuple[Callable[[Any], object], Any] | None = None
        """Celery's callback with its argument; None if Celery needs no telling (revoked, timed out)."""

    @property
    def name(self) -> str:
        return f"{self.call.args[0]}[{self.call.args[1]}]"

    def terminate(self, signal: object = None) -> None:
        """Celery's revoke(terminate=True), and its cancelling of active requests at a cold shutdown. Any thread."""
        self.pool.call_on_loop(self.pool.slots.stop, self)

    def start(self) -> None:
        self.pool.threads.submit(self._run)

    def stop(self) -> None:
        logger.warning("%s runs in a thread and can't be stopped; it holds its slot until it returns", self.name)

    def _run(self) -> None:
        self.trace()
        self.pool.call_on_loop(self.conclude)

    def trace(self, _: object = None) -> None:
        """Run Celery's tracer and note what it has to be told afterwards."""
        call = self.call
        self.accept()
        try:
            self.report = call.on_result, _without_frames(call.target(*call.args, **call.kwargs))
        except Stopped:
            pass
        except Exception:  # noqa: BLE001  the tracer's own failure, or a Reject it lets through
            self.report = call.on_error, ExceptionInfo()
        except BaseException as exc:  # noqa: BLE001  sys.exit() in a task fails the task, not the worker
            self.report = call.on_error, _as_failure(exc)

    def accept(self) -> None:
        self.is_accepted = True
        self.pool.hub.post(self.call.on_accepted, self.pool.pid, time.monotonic())

    def conclude(self) -> None:
        """The job's last act, on the loop's thread."""
        if not self.is_accepted:
            self.accept()  # a request that was told to end before it began is announced as revoked on its acceptance
        self.is_over = True
        self.pool.release(self)


class AsyncJob(Job, Coroutine[Any, Any, None]):
    """An ``async def`` task's run; itself the coroutine of its asyncio task."""

    _why: Literal["soft limit", "stop"] | None = None

    def start(self) -> None:
        loop = self.pool.loop
        self._greenlet = _JobGreenlet(self.trace)
        self._greenlet.job = self
        self._timers: list[asyncio.TimerHandle] = []
        for limit_s, is_soft in ((self.call.soft_limit_s, True), (self.call.hard_limit_s, False)):
            if limit_s:
                self._timers.append(loop.call_later(limit_s, self._at_limit, is_soft, limit_s))
        self._task = loop.create_task(self, name=self.name)

    def _at_limit(self, is_soft: bool, limit_s: float) -> None:
        if self._why == "stop":
            return
        self.pool.hub.post(self.call.on_timeout, is_soft, limit_s)  # the hard one stores the failure and acks
        if is_soft:
            self._why = "soft limit"
            self._task.cancel()
        else:
            self.stop()

    def stop(self) -> None:
        """Cancel the coroutine; again and again if it swallows that."""
        if self.is_over:
            return
        if self._why == "stop":
            logger.warning("%s ignores its cancellation; it is cancelled again", self.name)
        self._why = "stop"
        self._task.cancel()
        self._timers.append(self.pool.loop.call_later(self.pool.cancel_grace_s, self.stop))

    def conclude(self) -> None:
        for timer in self._timers:
            timer.cancel()
        super().conclude()
        del self._greenlet, self._task, self._timers  # they refer to us: no work for the garbage collector

    # -- the coroutine that asyncio runs: each step resumes the greenlet until it has something to wait for

    def send(self, value: Any) -> Any:
        if not self._greenlet:
            self._greenlet.gr_context = copy_context()
        return self._resume(self._greenlet.switch, value)

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        return self._resume(self._greenlet.throw, typ)

    def close(self) -> None:
        """asyncio calls this never; the abstract base does, through `throw`."""

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError("a job is run by the pool's own asyncio task")

    def _resume(self, switch: Callable[[Any], Any], value: Any) -> Any:
        try:
            awaited = switch(value)
        finally:
            if is_over := self._greenlet.dead:  # also if it was cancelled before its first step: `trace` never ran then
                self.conclude()
        if is_over:
            raise StopIteration
        return awaited

    # -- inside the greenlet

    def drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the task's coroutine to its end, leaving the greenlet for every wait."""
        wait = getcurrent().parent.switch
        value: Any = None
        thrown: BaseException | None = None
        try:
            while True:
                awaited = coroutine.send(value) if thrown is None else coroutine.throw(thrown)
                value = thrown = None
                try:
                    value = wait(awaited)
                except asyncio.CancelledError as exc:
                    thrown = self._cancellation(exc)
                except BaseException as exc:  # noqa: BLE001  the awaited thing failed: that is the coroutine's to handle
                    thrown = exc
        except StopIteration as end:
            if self._why == "stop":
                raise Stopped from None
            return end.value
        except SoftLimit:
            raise SoftTimeLimitExceeded from None
        except asyncio.CancelledError as exc:
            if self._why == "stop":
                raise Stopped from None
            raise RuntimeError("The task was cancelled from inside the worker, not by Celery.") from exc
        except (MemoryError, SystemExit, KeyboardInterrupt) as exc:  # Celery would end the worker for these
            raise RuntimeError(f"The task raised {exc!r}.") from exc
        except Exception:
            if self._why == "stop":
                logger.warning("%s failed while it was being stopped", self.name, exc_info=True)
                raise Stopped from None
            raise

    def _cancellation(self, exc: asyncio.CancelledError) -> BaseException:
        if self._why != "soft limit":
            return exc
        self._why = None
        self._task.uncancel()  # it may be caught: the task then goes on, and is no longer being cancelled
        return SoftLimit()


class _JobGreenlet(greenlet):
    job: AsyncJob


def _without_frames(outcome: Any) -> Any:
    """The tracer's outcome, its exception without the frames it passed (Celery has its traceback as text by now).

    They lead to the tracer's own, whose variables hold the exception: a cycle of all that the job had, and with it some
    10,000 objects that stand for the traceback, until a full collection."""
    match outcome:
        case (_, ExceptionInfo() as failure, *_):
            exc = getattr(failure.exception, "exc", failure.exception)
            seen: set[int] = set()
            while exc is not None and id(exc) not in seen:
                seen.add(id(exc))
                exc.__traceback__ = None
                exc = exc.__cause__ or exc.__context__
    return outcome


def _as_failure(exc: BaseException) -> ExceptionInfo:
    try:
        raise RuntimeError(f"The task raised {exc!r}.") from exc
    except RuntimeError:
        return ExceptionInfo()


def is_async(task: Task) -> bool:
    """Whether the task's own function, beneath what Celery wraps around it, is ``async def``."""
    return inspect.iscoroutinefunction(inspect.unwrap(getattr(task, "_orig_run", task.run)))


def bridge(task: Task) -> None:
    """Have an ``async def`` task's ``run`` be callable by Celery's tracer. Before the consumer builds the tracers."""
    if hasattr(task, "_orig_run"):  # `autoretry_for`: Celery's wrapper around it has to see the exceptions
        task._orig_run = _bridged(task, task._orig_run)
    else:
        task.run = _bridged(task, task.run)


def _bridged(task: Task, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        coroutine = function(*args, **kwargs)
        if not isinstance(current, _JobGreenlet) or not inspect.iscoroutine(coroutine):
            return coroutine  # called directly, by other code: as without the pool
        _running.set((task, task.request_stack.top))
        return current.job.drive(coroutine)

    return run
