"""``tokenfleet dead``: jobs that were given up because their workers died; look at them, queue them again."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import click

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import fields, note, table, write, write_json

if TYPE_CHECKING:
    from tokenfleet.producer.deadletters import DeadLetter


@click.group("dead")
def command() -> None:
    """Dead letters: jobs that were given up after three workers had died under them. They are kept for 7 days."""


@command.command("list")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, payload included.")
def list_dead(redis_url: str | None, fleet: str, as_json: bool) -> None:
    """List them, oldest first."""

    async def run() -> list[DeadLetter]:
        async with connected(redis_url, fleet) as client:
            return await client.dead_letters()

    letters = asyncio.run(run())
    if as_json:
        for letter in letters:
            write_json(_as_json(letter))
    elif letters:
        rows = [(x.job_id, x.model, _when(x.ended_ms), x.code, str(x.completion_tokens)) for x in letters]
        table(("JOB", "MODEL", "GIVEN UP", "ERROR", "TOKENS"), rows)


@command.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("job_id")
def show(redis_url: str | None, fleet: str, as_json: bool, job_id: str) -> None:
    """Show a failed job: its error, who died under it, and its payload."""

    async def run() -> DeadLetter:
        async with connected(redis_url, fleet) as client:
            return await client.dead_letter(job_id)

    letter = asyncio.run(run())
    if as_json:
        write_json(_as_json(letter))
        return
    fields(
        [
            ("job", letter.job_id),
            ("model", letter.model),
            ("error", f"[{letter.code}] {letter.message}"),
            ("attempts", f"{letter.attempts}, {letter.strikes} strikes"),
            ("tokens", str(letter.completion_tokens)),
            ("submitted", _when(letter.submitted_ms)),
            ("ended", _when(letter.ended_ms)),
            ("kept for", str(dt.timedelta(seconds=letter.kept_ms // 1000))),
            ("retry of", letter.options.retry_of or None),
            *(("death", _told(death)) for death in letter.deaths),
        ]
    )
    write("\n" + json.dumps(_payload(letter), ensure_ascii=False, indent=2) + "\n")


@command.command()
@connection_options
@click.argument("job_ids", nargs=-1, required=True)
def requeue(redis_url: str | None, fleet: str, job_ids: tuple[str, ...]) -> None:
    """Queue failed jobs again, each as a new job; prints the new ids. The same id twice makes one job."""

    async def run() -> None:
        async with connected(redis_url, fleet) as client:
            for job_id in job_ids:
                job = await client.requeue(job_id)
                note(f"{job_id} goes on as")
                write(f"{job.id}\n")

    asyncio.run(run())


def _payload(letter: DeadLetter) -> Any:
    return json.loads(letter.request)


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "job_id": letter.job_id, "model": letter.model, "code": letter.code, "message": letter.message,
        "strikes": letter.strikes, "attempts": letter.attempts, "completion_tokens": letter.completion_tokens,
        "submitted_ms": letter.submitted_ms, "ended_ms": letter.ended_ms, "kept_ms": letter.kept_ms,
        "deaths": list(letter.deaths), "options": letter.options.model_dump(mode="json", exclude_defaults=True),
        "request": _payload(letter),
    }  # fmt: skip


def _when(redis_ms: int) -> str:
    """Redis' clock, in this machine's time zone."""
    return dt.datetime.fromtimestamp(redis_ms / 1000, dt.UTC).astimezone().isoformat(" ", "seconds")


def _told(death: str) -> str:
    """A line of `DeadLetter.deaths` with its time for people."""
    ms, _, what = death.partition(" ")
    return f"{_when(int(ms))} {what}" if ms.isdecimal() else death
