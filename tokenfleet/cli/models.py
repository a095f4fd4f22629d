"""``tokenfleet models``: what a fleet serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import note, table, write_json

if TYPE_CHECKING:
    from tokenfleet.producer.overview import Overview


@click.command("models")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(redis_url: str | None, fleet: str, as_json: bool) -> None:
    """List the served models. One without a worker still takes jobs; they wait."""
    seen = asyncio.run(_look(redis_url, fleet))
    if as_json:
        write_json([{**msgspec.to_builtins(each.model), "workers": each.workers} for each in seen.models])
    elif not seen.models:
        note("This fleet has served no model yet.")
    else:
        rows = [
            (
                each.model.name,
                each.model.engine,
                str(each.model.context_tokens or ""),
                ", ".join(each.model.adapters),
                ", ".join(each.model.modalities),
                str(each.workers),
            )
            for each in seen.models
        ]
        table(("MODEL", "ENGINE", "CONTEXT", "ADAPTERS", "TAKES", "WORKERS"), rows)


async def _look(url: str | None, fleet: str) -> Overview:
    async with connected(url, fleet) as client:
        return await client.overview()
