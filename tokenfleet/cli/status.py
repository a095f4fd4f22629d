"""``tokenfleet status``: the fleet at a glance, one job in detail, or a health check."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tokenfleet.cli.connection import connected, connection_options, running_local
from tokenfleet.cli.output import amount, fields, seconds, table, write, write_json
from tokenfleet.wire.errors import FleetUnavailable

if TYPE_CHECKING:
    from tokenfleet.producer.overview import Overview
    from tokenfleet.wire.jobs import JobStatus, ServedModel
    from tokenfleet.wire.local_files import FleetState

NOT_READY = 3


@click.command("status")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option("--ready", is_flag=True, help="Print nothing but `ready`: a health check.")
@click.option("--model", metavar="NAME", help="With --ready: only workers that serve this model count.")
@click.option("--here", is_flag=True, help="With --ready: only workers on this host (or in this container) count.")
@click.option("--url", "shows_url", is_flag=True, help="Print the Redis URL, with its password, and nothing else.")
@click.argument("job_id", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    redis_url: str | None,
    fleet: str,
    as_json: bool,
    ready: bool,
    model: str | None,
    here: bool,
    shows_url: bool,
    job_id: str | None,
) -> None:
    """Tell how the fleet is: models, workers, queues, memory; or, with JOB_ID, one job.

    For a fleet the exit status is 0 when a worker is ready, else 3. For a job it is 0 whatever the job's state.
    """
    if job_id is not None:
        _show_job(asyncio.run(_job(redis_url, fleet, job_id)), as_json)
        return
    if (model or here) and not ready:
        raise click.UsageError("--model and --here go with --ready.")
    if shows_url:
        write(f"{redis_url or asyncio.run(running_local(fleet)).url}\n")
        return
    local, seen = asyncio.run(_look(redis_url, fleet))
    if ready:
        _check_ready(seen, model, here)
        write("ready\n")
        return
    _show_fleet(local, seen, as_json)
    if not seen.is_ready:
        ctx.exit(NOT_READY)


async def _look(url: str | None, fleet: str) -> tuple[FleetState | None, Overview]:
    local = None if url else await running_local(fleet)
    async with connected(url, fleet) as client:
        return local, await client.overview()


async def _job(url: str | None, fleet: str, job_id: str) -> JobStatus:
    async with connected(url, fleet) as client:
        return await client.job(job_id).status()


def _check_ready(seen: Overview, model: str | None, here: bool) -> None:
    """Raises `FleetUnavailable` with code ``no_worker``."""
    host = socket.gethostname()
    workers = [w for w in seen.workers if (not model or w.model == model) and (not here or w.host == host)]
    if not workers:
        which = (f" for {model!r}" if model else "") + (f" on {host}" if here else "")
        raise FleetUnavailable(f"No worker{which} is ready.", code="no_worker")


def _show_fleet(local: FleetState | None, seen: Overview, as_json: bool) -> None:
    if as_json:
        shown: dict[str, Any] = {**msgspec.to_builtins(seen), "ready": seen.is_ready}
        if local is not None:
            shown["local"] = {"state": local.state, "detail": local.detail, "supervisor_pid": local.pid}
        write_json(shown)
        return
    limit = f" of {amount(seen.redis.limit_bytes)}" if seen.redis.limit_bytes else ""
    running = None if local is None else f"{local.state}{f' ({local.detail})' if local.detail else ''}"
    fields(
        [
            ("fleet", seen.fleet),
            ("local fleet", running),
            ("redis", f"{seen.redis.server}, {amount(seen.redis.used_bytes)}{limit} used"),
            ("dead letters", str(seen.dead_letters) if seen.dead_letters else None),
            ("models", None if seen.models else "none yet"),
            ("workers", None if seen.workers else "none"),
        ]
    )
    if seen.models:
        write("\n")
        rows = [
            (each.model.name, _engines(each.model, seen), str(each.workers), str(each.running), str(each.waiting))
            for each in seen.models
        ]
        table(("MODEL", "ENGINE", "WORKERS", "RUNNING", "WAITING"), rows)
    if seen.workers:
        write("\n")
        rows = [(w.id, w.model, w.host, str(w.pid), f"{w.running}/{w.slots}") for w in seen.workers]
        table(("WORKER", "MODEL", "HOST", "PID", "JOBS"), rows)


def _engines(model: ServedModel, seen: Overview) -> str:
    """Of its workers; without any, of the last."""
    return ", ".join(sorted({w.engine for w in seen.workers if w.model == model.name})) or model.engine


def _show_job(status: JobStatus, as_json: bool) -> None:
    timing = status.timing
    if as_json:
        write_json({**asdict(status), "error": msgspec.to_builtins(status.error), **msgspec.to_builtins(timing)})
        return
    rate = None if timing.tokens_per_s is None else f"{timing.tokens_per_s:.1f}"
    fields(
        [
            ("job", status.id),
            ("state", status.state + (", no worker serves its model now" if status.waiting_for_worker else "")),
            ("position", None if status.position is None else f"{status.position} before it"),
            ("model", status.model),
            ("priority", status.priority),
            ("tags", ", ".join(f"{key}={value}" for key, value in status.tags.items()) or None),
            ("worker", status.worker),
            ("attempts", f"{status.attempts}{f', {status.strikes} strikes' if status.strikes else ''}"),
            ("tokens", str(status.completion_tokens)),
            ("events", str(status.events)),
            ("submitted", _when(status.submitted_ms)),
            ("ended", _when(status.ended_ms)),
            ("deadline", None if status.is_ended else _when(status.deadline_ms)),
            ("queue wait", None if timing.queue_wait_s is None else seconds(timing.queue_wait_s)),
            ("first token", None if timing.ttft_s is None else f"after {seconds(timing.ttft_s)}"),
            ("in all", None if timing.total_s is None else seconds(timing.total_s)),
            ("tokens/s", rate),
            ("error", None if status.error is None else f"[{status.error.code}] {status.error.message}"),
        ]
    )


def _when(redis_ms: int | None) -> str | None:
    """Redis' clock, in this machine's time zone."""
    if redis_ms is None:
        return None
    return dt.datetime.fromtimestamp(redis_ms / 1000, dt.UTC).astimezone().isoformat(" ", "milliseconds")
