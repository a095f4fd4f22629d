"""``python -m tokenfleet.producer.gateway.serve``: the gateway under uvicorn, in one process or several."""

from __future__ import annotations

import uvicorn

from tokenfleet.producer.gateway.app import create_app
from tokenfleet.producer.gateway.settings import GatewaySettings


def make() -> object:
    """uvicorn's factory: settings come from the environment, in each process."""
    return create_app(GatewaySettings())


def main() -> None:
    settings = GatewaySettings()
    uvicorn.run(
        "tokenfleet.producer.gateway.serve:make",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.processes,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=65536,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
