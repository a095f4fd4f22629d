"""The gateway's application: routes, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI, Request

from tokenfleet import __version__
from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.apikeys import KeyStore
from tokenfleet.producer.gateway import chat, errors, models, operations
from tokenfleet.producer.gateway.metrics import Metrics
from tokenfleet.producer.gateway.outermost import Outermost
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire.errors import ConfigurationError

# Health says nothing about anybody; all else needs a key once there are keys.
OPEN_PATHS = frozenset({"/health", "/ready"})


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application for any ASGI server. Its start raises `ConfigurationError` for a public address without keys."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client = AsyncClient(settings.redis_url, fleet=settings.fleet, max_queued=settings.max_queued)
        app.state.client = client
        app.state.keys = KeyStore(client.ledger.client, client.keys)
        app.state.settings = settings
        try:
            await client.check()
            if not settings.is_loopback and not settings.allow_no_keys and not await app.state.keys.has_any():
                raise ConfigurationError(
                    f"The gateway does not serve on {settings.host} without API keys.",
                    hint="Make one: `tokenfleet keys create NAME`.",
                )
            yield
        finally:
            await client.aclose()

    app = FastAPI(
        title="tokenfleet", version=__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None,
        dependencies=[Depends(_guard)],
    )  # fmt: skip
    errors.install(app)
    app.state.metrics = Metrics()
    app.add_middleware(Outermost)
    for part in (chat, models, operations):
        app.include_router(part.router)
    return app


async def _guard(request: Request) -> None:
    """Runs before every route."""
    if request.url.path not in OPEN_PATHS:
        request.state.tenant = await request.app.state.keys.tenant_of(request.headers.get("authorization"))
