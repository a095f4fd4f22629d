"""The Celery tasks of a worker. ``tokenfleet.run`` is what a job's own message names; it holds the id and no more."""

from __future__ import annotations

from celery.exceptions import Ignore

from tokenfleet.workers.celery_app import app, runtime
from tokenfleet.workers.pool import AsyncTask


@app.task(name="tokenfleet.run", base=AsyncTask, ignore_result=True, acks_late=True)
async def run(job_id: str) -> None:
    """Run a job to its end. A duplicate, late, cancelled or expired message claims nothing."""
    if not await runtime().run_job(job_id):
        raise Ignore
