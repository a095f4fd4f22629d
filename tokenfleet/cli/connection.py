"""Which fleet a command talks to: ``--redis-url`` and ``--fleet``, or the running local fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tokenfleet.cli.media import media_settings
from tokenfleet.wire.errors import FleetUnavailable

if TYPE_CHECKING:
    from tokenfleet.producer.aio import AsyncClient
    from tokenfleet.wire.local_files import FleetState

REDIS_URL, FLEET, MODEL = "TOKENFLEET_REDIS_URL", "TOKENFLEET_FLEET", "TOKENFLEET_MODEL"
_STARTING_S = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])


def connection_options(command: Command) -> Command:
    """``--redis-url`` and ``--fleet`` of a command that needs a fleet that runs."""
    fleet_help = "The fleet's name; without a Redis URL, that of a local fleet."
    url_help = (
        "A running fleet's Redis. By default the local fleet's. Better set by the environment: it has a password."
    )
    command = click.option("--fleet", envvar=FLEET, default="default", show_default=True, help=fleet_help)(command)
    return click.option("--redis-url", envvar=REDIS_URL, metavar="URL", help=url_help)(command)


@asynccontextmanager
async def connected(redis_url: str | None, fleet: str, model: str | None = None) -> AsyncIterator[AsyncClient]:
    """A checked client of the fleet that the options name. Raises `FleetUnavailable` (``no_fleet`` if none runs)."""
    from tokenfleet.producer.aio import AsyncClient

    local = None if redis_url else await running_local(fleet)
    url, media = (local.url, media_settings(local.media_folder)) if local else (redis_url or "", media_settings())
    async with AsyncClient(url, fleet=fleet, model=model, media=media) as client:
        yield client


async def running_local(fleet: str) -> FleetState:
    """The state of a local fleet whose Redis is up, or nearly."""
    from tokenfleet.producer import local_fleet

    waited_s = 0.0
    while True:
        state = local_fleet.status(fleet)
        if state is None:
            raise FleetUnavailable(
                f"No local fleet {fleet!r} is running.",
                code="no_fleet",
                hint=f"Start one with `tokenfleet up`, or name a running one with --redis-url ({REDIS_URL}).",
            )
        if state.state == "failed":
            raise FleetUnavailable(
                f"Local fleet {fleet!r} failed: {state.detail}",
                code="fleet_failed",
                hint="`tokenfleet up` tries again.",
            )
        if state.url:
            return state
        if waited_s > _STARTING_S:
            raise FleetUnavailable(f"Local fleet {fleet!r} is {state.state}: {state.detail}", code="fleet_failed")
        await asyncio.sleep(0.05)
        waited_s += 0.05
