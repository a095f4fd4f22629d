"""The Celery tasks of a worker.

``tokenfleet.run`` is what a job's own message names; it holds the id and no more. ``tokenfleet.chat`` and
``tokenfleet.score`` are for Celery users' own apps, chains, groups and chords (`producer/signatures.py`).
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from celery.exceptions import Ignore
from celery.worker.request import Request

from tokenfleet.wire.errors import CallerError
from tokenfleet.wire.jobs import JobOptions
from tokenfleet.wire.requests import chat_request, score_request
from tokenfleet.workers.celery_app import app, runtime
from tokenfleet.workers.links import links_of
from tokenfleet.workers.pool import AsyncTask


class QuietRequest(Request):
    """A request that shows nobody its arguments: not events, Flower, ``inspect`` or the log."""

    @property
    def argsrepr(self) -> str:
        return "(...)"

    @property
    def kwargsrepr(self) -> str:
        return "{...}"

    def info(self, safe: bool = False) -> dict[str, Any]:
        return {**super().info(safe=True), "args": self.argsrepr, "kwargs": self.kwargsrepr}


# A wrong request is no fault of the worker: Celery logs what a task ``throws`` in a line, all else as a traceback.
@app.task(name="tokenfleet.run", base=AsyncTask, throws=(CallerError,))
async def run(job_id: str) -> None:
    """Run a job to its end. A duplicate, late, cancelled or expired message claims nothing."""
    if not await runtime().run_job(job_id):
        raise Ignore


class Intake(AsyncTask):
    """A task that a Celery user sends. Its id becomes the job's, its links follow the job's end.

    It stores its own failure (bad arguments), which the job that it would have become can't."""

    abstract = True
    Request = QuietRequest
    store_errors_even_if_ignored = True


@app.task(name="tokenfleet.chat", base=Intake, bind=True, throws=(CallerError,))
async def chat(self: Any, messages: Any = (), **named: Any) -> None:
    """Queue a chat as `Client.submit` does, under this task's id."""
    request, options = chat_request(messages, named)
    await runtime().take_in(self.request.id, request, _until(self.request.expires, options), links_of(self.request))
    raise Ignore


@app.task(name="tokenfleet.score", base=Intake, bind=True, throws=(CallerError,))
async def score(self: Any, texts: Any, **named: Any) -> None:
    """Queue texts to be scored as `Client.submit_scores` does, under this task's id."""
    request, options = score_request(texts, named)
    await runtime().take_in(self.request.id, request, _until(self.request.expires, options), links_of(self.request))
    raise Ignore


def _until(expires: Any, options: JobOptions) -> JobOptions:
    """Celery's ``expires`` (a time, by the sender's clock) is the queue's time-to-live."""
    if not expires:
        return options
    until = expires if isinstance(expires, dt.datetime) else dt.datetime.fromisoformat(expires)
    left_s = (until - dt.datetime.now(until.tzinfo or dt.UTC)).total_seconds() - options.delay_s
    return options.model_copy(update={"queue_ttl_s": min(options.queue_ttl_s, max(0.001, left_s))})
