"""``tokenfleet serve``: the OpenAI-compatible gateway."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import note
from tokenfleet.wire.errors import ConfigurationError


@click.command("serve")
@connection_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Other than loopback needs API keys.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 64))
def command(redis_url: str | None, fleet: str, host: str, port: int, processes: int) -> None:
    """Serve OpenAI's API on a fleet: http://HOST:PORT/v1. More settings: TOKENFLEET_GATEWAY_* (docs/gateway.md)."""
    try:
        from tokenfleet.producer.gateway import serve
    except ImportError as error:
        raise ConfigurationError(
            f"The gateway needs packages that are not installed ({error.name}).",
            code="missing_extra",
            hint="Install it: pip install 'tokenfleet[gateway]'",
        ) from error
    url, name, folder = asyncio.run(_address(redis_url, fleet))
    given = {"REDIS_URL": url, "FLEET": name, "HOST": host, "PORT": str(port), "PROCESSES": str(processes)}
    # uvicorn's processes build their own settings, from the environment.
    if folder is not None:
        os.environ.setdefault("TOKENFLEET_GATEWAY_MEDIA_FOLDER", str(folder))
    os.environ.update({f"TOKENFLEET_GATEWAY_{key}": value for key, value in given.items()})
    serve.refuse_wrong_settings()
    note(f"OpenAI's API on http://{host}:{port}/v1")
    serve.main()


async def _address(redis_url: str | None, fleet: str) -> tuple[str, str, Path | None]:
    async with connected(redis_url, fleet) as client:
        return client.redis_url, client.keys.fleet, client.media.settings.folder
