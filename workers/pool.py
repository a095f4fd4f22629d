"""A Celery pool that runs ``async def`` tasks on one event loop.

Selected by ``worker_pool = "tokenfleet.workers.pool:AsyncioPool"`` in Celery's configuration.

Who owns what (docs/adr/0002-asyncio-pool.md):

=================  ================================================================================================
main thread        Celery's hub: messages, acks, requests, remote control, heartbeats; all signal handlers
tokenfleet-loop    the event loop: lifespans (the engine), tracers, coroutines, slots; lives as long as the worker
tokenfleet-task_n  plain ``def`` tasks
tokenfleet-signals waits for SIGQUIT and asks who sent it
=================  ================================================================================================

Calls cross only by `AsyncioPool.call_on_loop` (towards the loop) and `HubMailbox.post` (towards Celery).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from celery import signals
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown
from celery.worker import state

from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.workers import pool_signals
from tokenfleet.workers.deliveries import harden
from tokenfleet.workers.pool_changes import keep_client, let_revoke_cancel
from tokenfleet.workers.pool_hub import HubMailbox
from tokenfleet.workers.pool_job import AsyncJob, AsyncTask, Call, Job, bridge, is_async
from tokenfleet.workers.pool_lifespan import Lifespans, register_lifespan
from tokenfleet.workers.pool_slots import Slots

__all__ = ["AsyncTask", "AsyncioPool", "register_lifespan"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class AsyncioPool(BasePool):
    """Slots = concurrency = prefetch: the consumer is told to hold no more messages than there are slots, whatever
    ``worker_prefetch_multiplier`` says (early-acknowledged tasks and due ETA tasks may still wait for a slot here)."""

    body_can_be_buffer = True
    signal_safe = False

    cancel_grace_s = 2.0
    """A cancelled coroutine that isn't over by then is cancelled again, or, at a shutdown, left behind."""
    warm_closing_s = 20.0
    """What all lifespans may take to close after the last task."""
    cold_closing_s = 4.0
    exit_s = 10.0
    """What a cold shutdown may take in all, or an exit that leaves something behind; then the process is ended."""
    max_threads = 8
    """For plain ``def`` tasks."""

    _current: ClassVar[AsyncioPool | None] = None

    limit: int
    loop: asyncio.AbstractEventLoop

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pid = os.getpid()
        self.hub = HubMailbox()
        self._worker: Any = None  # Celery's, when started by its command line
        self._open: set[Job] = set()  # hub's thread: from on_apply until Celery was told the outcome
        self.slots = Slots(self.limit, lambda job: self.hub.post(self._open.discard, job))  # loop's thread
        self._lifespans = Lifespans()
        self._thread: threading.Thread | None = None
        self._quit_listeners: list[Callable[[int], object]] = []
        self._is_closed = False
        self._is_ending = False
        self._stop_reasons: set[str] = set()
        self._is_interrupted = False
        signals.celeryd_after_setup.connect(self._meet_worker)
        signals.worker_shutting_down.connect(self._on_shutdown_signal)
        signals.worker_shutdown.connect(self._after_shutdown)

    # -- for other code of the worker ---------------------------------------------------------------------------------

    @classmethod
    def current(cls) -> AsyncioPool:
        """The pool of this worker process, once its loop is there (so in every lifespan and task)."""
        if cls._current is None:
            raise RuntimeError("No AsyncioPool runs in this process.")
        return cls._current

    def run_on_loop(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``coroutine`` on the loop, from any other thread. Don't wait for the result on the loop's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call_on_loop(self, call: Callable[..., object], *args: Any) -> None:
        """Have ``call(*args)`` made on the loop, soon; nothing happens if the loop is gone. Any thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)

    def set_slots(self, slots: int) -> None:
        """Have as many slots as the engine batches; only while lifespans are entered (later: Celery's pool_grow)."""
        if self._lifespans.settled.is_set():
            raise RuntimeError("The number of slots can only be set while the worker starts.")
        if slots < 1:
            raise ValueError(f"A worker needs at least one slot, not {slots}.")
        self.limit = slots

    def stop_worker(
        self, reason: str, exit_code: int = os.EX_SOFTWARE, *, is_cold: bool = False, within_s: float | None = None
    ) -> None:
        """Shut the worker down, from any thread, because it can't serve any more (its engine died).

        Running tasks finish, or, if ``is_cold``, are cancelled and their messages go back into the queue. After
        ``within_s`` the process is ended wherever it is."""
        if reason not in self._stop_reasons:  # a dead engine is met by each of its jobs
            self._stop_reasons.add(reason)
            logger.critical("The worker stops: %s", reason)
        if is_cold:
            state.should_terminate = exit_code
        else:
            state.should_stop = exit_code
        self.hub.wake()
        if within_s is not None and not self._is_ending:
            self._end_process_within(within_s)

    def on_child_quit(self, listener: Callable[[int], object]) -> None:
        """Have ``listener(pid)`` called on the loop when this process or a child of it sent us SIGQUIT (SGLang does
        when one of its processes fails): the engine is to be checked; the worker itself goes on."""
        self._quit_listeners.append(listener)

    # -- start --------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        self._async_tasks = frozenset(name for name, task in self.app.tasks.items() if is_async(task))
        for name in self._async_tasks:
            bridge(self.app.tasks[name])
        self.threads = ThreadPoolExecutor(self.max_threads, thread_name_prefix="tokenfleet-task")
        let_revoke_cancel(AsyncioPool)
        if self._worker is not None and pool_signals.is_available():
            # Before Celery's handler cancels what runs: else the freed slots would go to jobs that still wait.
            pool_signals.watch_quit(self._on_own_quit, lambda: self.call_on_loop(self.slots.close))
        is_up = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, args=(is_up,), name="tokenfleet-loop", daemon=True)
        self._thread.start()
        is_up.wait()
        self._enter_lifespans()
        self.call_on_loop(self.slots.resize, self.limit)
        self._fit_consumer()

    def _run_loop(self, is_up: threading.Event) -> None:
        with asyncio.Runner() as runner:
            self.loop = runner.get_loop()
            life = self.loop.create_task(self._lifespans.live(), name="lifespans")
            AsyncioPool._current = self
            self.loop.call_soon(is_up.set)
            while not life.done():
                try:
                    self.loop.run_until_complete(life)
                except (SystemExit, KeyboardInterrupt) as exc:  # of some asyncio task: no reason to end the others
                    logger.error("Code on the event loop raised %r: ignored", exc)  # noqa: TRY400
            # Leaving the runner cancels what tasks left behind.
        if self._lifespans.is_entered and not self._is_closed:  # somebody cancelled all tasks of the loop, say
            self.stop_worker(f"the event loop ended ({self._lifespans.error!r})", is_cold=True)

    def _enter_lifespans(self) -> None:
        while not self._lifespans.settled.wait(0.1):  # in slices: the main thread runs signal handlers in between
            if _is_told(state.should_stop) or _is_told(state.should_terminate):
                logger.warning("Told to shut down while starting")
                self._close(self.cold_closing_s)
                raise WorkerShutdown(os.EX_OK if not _is_told(state.should_terminate) else 1)
        if (error := self._lifespans.error) is not None:
            what = str(error) if isinstance(error, TokenfleetError) else f"{type(error).__name__}: {error}"
            logger.critical("The worker can't start: %s", " ".join(what.split()))
            logger.debug("The error in full", exc_info=error)
            self._close(self.cold_closing_s)
            raise WorkerShutdown(1)

    def _meet_worker(self, instance: Any = None, **_: Any) -> None:
        if instance is not None and instance.pool is self:
            self._worker = instance

    def _fit_consumer(self) -> None:
        """Celery sized its consumer before the slots were known, and with its own multiplier."""
        if self._worker is not None:
            self._worker.concurrency = self._worker.min_concurrency = self.limit
            self._worker.prefetch_multiplier = self._worker.consumer.prefetch_multiplier = 1
            self._worker.consumer.initial_prefetch_count = self._worker.max_concurrency or self.limit

    def register_with_event_loop(self, hub: Any) -> None:
        self.hub.register(hub)
        if self._worker is not None:
            channel = self._worker.consumer.task_consumer.channel
            keep_client(channel)
            harden(channel, hub)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **options: Any,
    ) -> Job:
        call = Call(
            target,
            args,
            kwargs,
            options["accept_callback"],
            options["callback"],
            options["error_callback"],
            options["timeout_callback"],
            options.get("soft_timeout") or self.options.get("soft_timeout"),
            options.get("timeout") or self.options.get("timeout"),
        )
        job = (AsyncJob if args[0] in self._async_tasks else Job)(self, call)
        self._open.add(job)
        self.call_on_loop(self.slots.admit, job)
        return job

    def release(self, job: Job) -> None:
        """A job is over; on the loop's thread."""
        self.slots.release(job)
        self.hub.post(self._report, job)

    def _report(self, job: Job) -> None:
        self._open.discard(job)
        if job.report is not None:
            (callback, argument), job.report = job.report, None
            callback(argument)

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """All jobs share this process: `Job.terminate`, which Celery calls next, ends the right one."""

    def grow(self, n: int = 1) -> None:
        """Celery raises the consumer's prefetch by as much."""
        if n < 1:
            raise ValueError(f"Can't grow the pool by {n}.")
        self.limit += n
        self.call_on_loop(self.slots.resize, self.limit)

    def shrink(self, n: int = 1) -> None:
        """What runs finishes. Celery lowers the consumer's prefetch by as much."""
        if not 1 <= n < self.limit:
            raise ValueError(f"Can't shrink a pool of {self.limit} slots by {n}: at least one has to be left.")
        self.limit -= n
        self.call_on_loop(self.slots.resize, self.limit)

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "running": len(self.slots.running),
            "waiting": len(self.slots.waiting),
            "most-running": self.slots.most_running,
        }

    def _on_own_quit(self, pid: int) -> None:
        logger.warning("Process %d of this worker sent SIGQUIT: asking the engine how it is", pid)
        for listener in self._quit_listeners:
            self.call_on_loop(listener, pid)

    # -- stop ---------------------------------------------------------------------------------------------------------
    # Take no new work (Celery stopped its consumer) → finish or cancel what runs → tell Celery, which acks → leave the
    # lifespans (the engine) → end the loop. Acks go out with the hub's turns, the last ones when Celery closes it.

    def on_close(self) -> None:
        """A shutdown has begun."""
        if AsyncioPool._current is self:
            self.call_on_loop(self.slots.close)

    def on_stop(self) -> None:
        """Warm shutdown: returns when the last task is over. A cold one that is asked for meanwhile cuts it short."""
        if state.should_terminate:  # we are in Celery's SIGQUIT handler, on top of anything: `on_terminate` comes next
            self.call_on_loop(self.slots.stop_all)
            self.hub.wake()
            return
        while self._open and not state.should_terminate:
            self.hub.turn(0.5)
        if self._open:
            self.on_terminate()
        else:
            self._close(self.warm_closing_s)
            if self._is_interrupted and not self._stop_reasons and self._worker is not None:
                self._worker.exitcode = os.EX_OK  # all is done, as after SIGTERM; for a Ctrl-C Celery says 1

    def on_terminate(self) -> None:
        """Cold shutdown. What was cancelled isn't acked: closing the channel puts it back into the queue."""
        if self._is_closed:
            return
        if self._worker is not None and self._worker.exitcode is None:
            is_code = type(state.should_terminate) is int  # True, from Celery's own handler, isn't
            self._worker.exitcode = state.should_terminate if is_code else 1  # Celery would say 0
        self._end_process_within(self.exit_s)
        self.call_on_loop(self.slots.stop_all)
        deadline = time.monotonic() + self.cancel_grace_s
        while self._open and (left_s := deadline - time.monotonic()) > 0:
            self.hub.turn(left_s)
        self._close(self.cold_closing_s)

    def _close(self, limit_s: float) -> None:
        if self._is_closed or self._thread is None:
            return
        self._is_closed = True
        for job in self._open:
            logger.error("%s ignores its cancellation and is left behind", job.name)
        self.call_on_loop(self._lifespans.leave)
        if not self._lifespans.ended.wait(limit_s):
            logger.error("The engine or another lifespan did not close within %g s and is left behind", limit_s)
        elif self._lifespans.error is not None and self._lifespans.is_entered:
            logger.error("A lifespan failed while closing", exc_info=self._lifespans.error)
        self.threads.shutdown(wait=False, cancel_futures=True)
        self._thread.join(1.0)
        if self._open or self._thread.is_alive():
            self._end_process_within(self.exit_s)
        AsyncioPool._current = None

    def _end_process_within(self, limit_s: float) -> None:
        """A finished interpreter would wait for threads that never end (a stuck task, a loading engine)."""
        if self._worker is None:  # embedded in somebody else's process
            return
        self._is_ending = True

        def end() -> None:
            time.sleep(limit_s)
            logger.critical("The process does not exit by itself %g s after its shutdown: ending it", limit_s)
            logging.shutdown()
            os._exit(self._worker.exitcode or 1)

        threading.Thread(target=end, name="tokenfleet-exit", daemon=True).start()

    def _after_shutdown(self, **_: Any) -> None:
        """Celery stops no bootstep if a later one failed to start, but it sends this signal."""
        self._close(self.cold_closing_s)
        self.hub.close()

    def _on_shutdown_signal(self, sig: str = "", **_: Any) -> None:
        self._is_interrupted = sig == "SIGINT"
        self.on_close()
        self.hub.wake()  # Celery looks at the handler's flag after the hub's current poll: up to a second, else


def _is_told(flag: Any) -> bool:
    return flag is not None and flag is not False  # 0 is an exit code: it means yes
