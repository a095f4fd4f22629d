"""``python -m tokenfleet.producer.gateway.serve``: the gateway under uvicorn, in one process or several."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile

import uvicorn

from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.gateway import metrics
from tokenfleet.producer.gateway.app import check, create_app
from tokenfleet.producer.gateway.head import LimitedHead
from tokenfleet.producer.gateway.settings import GatewaySettings, settings_from_environment


def make() -> object:
    """uvicorn's factory: settings come from the environment, in each process."""
    return create_app(settings_from_environment())


def refuse_wrong_settings() -> None:
    """Before uvicorn, which would show a traceback. Raises what `create_app`'s start raises, and `ConfigurationError`
    for variables that are not valid."""
    settings = settings_from_environment()

    async def look() -> None:
        async with AsyncClient(settings.redis_url, fleet=settings.fleet) as client:
            await check(client, settings)

    asyncio.run(look())


def main() -> None:
    settings = settings_from_environment()
    if settings.processes == 1:
        _run(settings)
        return
    # Before a child imports prometheus-client: all write what they count to files, any can tell the sum.
    with tempfile.TemporaryDirectory(prefix="tokenfleet-metrics-") as folder:
        os.environ.setdefault(metrics.FOLDER, folder)
        _run(settings)


def _run(settings: GatewaySettings) -> None:
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if settings.processes == 1 and hang_up is not None and signal.getsignal(hang_up) == signal.SIG_DFL:
        # Its terminal is closed: end as uvicorn does at SIGTERM, with the jobs whose clients are cut off.
        signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))
    uvicorn.run(
        "tokenfleet.producer.gateway.serve:make",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.processes,
        http=LimitedHead,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
        # uvicorn kills a process that does not answer for so long, also while it starts: not for a machine that is slow
        # or stood still, for its streams would die with it.
        timeout_worker_healthcheck=30,
    )


if __name__ == "__main__":
    main()
