"""The Celery app of a worker, and how its process comes up: settings, lifespan of the runtime, signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

from celery import Celery
from celery.signals import task_revoked, worker_shutting_down
from celery.worker import state
from celery.worker.consumer import Mingle
from kombu.exceptions import KombuError
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tokenfleet.engines import models
from tokenfleet.wire import urls
from tokenfleet.wire.errors import ConfigurationError, TokenfleetError
from tokenfleet.workers.event_pacing import EventPacing
from tokenfleet.workers.links import send_links
from tokenfleet.workers.pool import AsyncioPool, register_lifespan
from tokenfleet.workers.runtime import Runtime
from tokenfleet.workers.served import Served
from tokenfleet.workers.settings import WorkerSettings
from tokenfleet.workers.worker_state import report_state

log = logging.getLogger(__name__)

app = Celery("tokenfleet", include=["tokenfleet.workers.tasks"])
app.config_from_object("tokenfleet.celeryconfig")
app.steps["consumer"].add(EventPacing)
# At each start and reconnect it would ask all workers for a second what was revoked; the ledger knows.
Mingle.compatible_transports = frozenset()

_LEAVING_S = 15.0
"""What a worker may take to leave whose engine is dead or hangs. Its jobs are given away before."""

_running: Runtime | None = None
_told_to_leave = False


def runtime() -> Runtime:
    """This worker's runtime; there is one once the pool's loop is up."""
    assert _running is not None, "asked for the runtime outside a running worker"
    return _running


@register_lifespan
@contextlib.asynccontextmanager
async def _lifespan() -> AsyncIterator[None]:
    global _running
    settings: WorkerSettings = app.conf["tokenfleet_settings"]
    url = settings.redis_url
    report_state("loading", detail=f"loading {settings.model}")
    models.listen(lambda step, share: report_state("loading", detail=step, progress=share))
    _running = Runtime(
        settings,
        Served(settings),
        # One attempt, in a bounded time: publisher, lease and control channel try again by themselves. redis-py would
        # pause a second and more between its own tries.
        lambda: urls.connect_async(
            url, socket_timeout=5.0, socket_connect_timeout=2.0, retry=AsyncRetry(NoBackoff(), 0)
        ),
        lambda: urls.connect(
            url, socket_timeout=settings.lease.lease_s / 2, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
        ),
        _stop_dead,
        lambda is_busy: report_state("ready", detail=settings.model, models=(settings.model,), is_busy=is_busy),
        functools.partial(_follow_up, settings),
    )
    _running.is_revoked = lambda job_id: job_id in state.revoked
    _running.is_leaving = lambda: any(told not in (None, False) for told in (state.should_stop, state.should_terminate))
    try:
        if not settings.model:
            raise ConfigurationError(
                "This worker does not know which model to serve.", hint="Set TOKENFLEET_MODEL (docs/settings.md)."
            )
        async with _running.open():
            report_state("ready", detail=settings.model, models=(settings.model,))
            yield
    except TokenfleetError as error:
        report_state("failed", error=error)
        raise


def _follow_up(settings: WorkerSettings, job_id: str) -> None:
    """Send an ended job's Celery links; what fails stays in the outbox for the next reap."""
    try:
        with urls.connect(settings.redis_url, socket_timeout=5.0) as client:
            send_links(app, client, settings.keys, job_id)
    except (RedisError, OSError, KombuError) as error:
        log.warning("job %s: its links are not sent yet: %s", job_id, type(error).__name__)


def _stop_dead(reason: str) -> None:
    """The engine is dead, or hangs: leave with a status that makes a supervisor start a new worker; in a bounded time,
    since closing what is broken may not end."""
    AsyncioPool.current().stop_worker(f"the engine is dead: {reason}", within_s=_LEAVING_S)


@task_revoked.connect
def _revoked(request: Any = None, **_: Any) -> None:
    """Celery discards a revoked job's message before any task code runs: tell the ledger."""
    if _running is not None:  # also where it was terminated: it may have waited for a slot and never have run
        job_id = request.id if hasattr(request, "id") else request
        asyncio.run_coroutine_threadsafe(_running.revoked(job_id), _running.loop)


@worker_shutting_down.connect
def _drain(how: str = "Warm", **_: Any) -> None:
    """Warm shutdown: running jobs get ``grace_s``, then they are handed over; at once when told a second time.

    Called in a signal handler."""
    global _told_to_leave
    if _running is None:
        return
    hand_over = lambda: asyncio.run_coroutine_threadsafe(_running.hand_over_all(), _running.loop)  # noqa: E731
    is_urgent, _told_to_leave = _told_to_leave or how == "Cold", True
    timer = threading.Timer(0.0 if is_urgent else _running.settings.grace_s, hand_over)
    timer.daemon = True
    timer.start()
