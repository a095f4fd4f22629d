"""``tokenfleet cancel``: end a job."""

from __future__ import annotations

import asyncio

import click

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import write


@click.command("cancel")
@connection_options
@click.option("--reason", default="", metavar="TEXT", help="Told to whoever watches.")
@click.argument("job_id")
def command(redis_url: str | None, fleet: str, reason: str, job_id: str) -> None:
    """End a job, queued or running, and print its state: cancelled, or how it had ended before."""
    write(f"{asyncio.run(_cancel(redis_url, fleet, job_id, reason))}\n")


async def _cancel(url: str | None, fleet: str, job_id: str, reason: str) -> str:
    async with connected(url, fleet) as client:
        return await client.job(job_id).cancel(reason)
