"""``tokenfleet watch``: follow a job, from the start or from where one left off."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import write, write_json

if TYPE_CHECKING:
    from tokenfleet.producer.aio_job import AsyncStream


@click.command("watch")
@connection_options
@click.option("--from", "after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Go on after this event.")
@click.option("--choice", type=click.IntRange(min=0), default=0, show_default=True, help="Which of n answers.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as JSON, one a line, with its seq.")
@click.argument("job_id")
def command(redis_url: str | None, fleet: str, after: int, choice: int, as_json: bool, job_id: str) -> None:
    """Print a job's answer as it is written, until it ends.

    Any number may watch, at any time while the job is kept. Leaving (Ctrl-C) costs the job nothing; with --json the
    last line's seq is what --from takes to go on from there. The exit status is 1 if the job does not finish.
    """
    asyncio.run(_watch(redis_url, fleet, job_id, after, choice, as_json))


async def _watch(url: str | None, fleet: str, job_id: str, after: int, choice: int, as_json: bool) -> None:
    async with connected(url, fleet) as client, client.job(job_id).stream(after) as stream:
        if as_json:
            await _print_events(stream)
        else:
            await _print_text(stream, choice)


async def _print_text(stream: AsyncStream, choice: int) -> None:
    last = ""
    try:
        async for piece in stream.text(choice):
            write(piece)
            last = piece
    finally:
        if last and not last.endswith("\n"):
            write("\n")


async def _print_events(stream: AsyncStream) -> None:
    from tokenfleet.producer.aio_job import raise_for

    async for event in stream:
        write_json({"seq": stream.cursor, **msgspec.to_builtins(event)})
        raise_for(event)
