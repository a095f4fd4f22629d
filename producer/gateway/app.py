"""The gateway's application: routes, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from tokenfleet import __version__
from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.apikeys import KeyStore
from tokenfleet.producer.gateway import chat, documents, errors, models, operations, responses, tokens
from tokenfleet.producer.gateway.guard import Guard
from tokenfleet.producer.gateway.metrics import Metrics
from tokenfleet.producer.gateway.outermost import Outermost
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.producer.tenants import Tenants
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.media import MediaSettings


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application for any ASGI server. Its start raises `ConfigurationError` for a public address without keys."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        media = MediaSettings(folder=settings.media_folder, max_bytes=settings.max_media_bytes)
        client = AsyncClient(settings.redis_url, fleet=settings.fleet, max_queued=settings.max_queued, media=media)
        app.state.client = client
        needs_keys = not settings.is_loopback and not settings.allow_no_keys
        app.state.keys = KeyStore(client.ledger.client, client.keys, always=needs_keys)
        app.state.tenants = Tenants(client.ledger.client, client.keys)
        app.state.settings = settings
        try:
            await client.check()
            if needs_keys and not await app.state.keys.has_any():
                raise ConfigurationError(
                    f"The gateway does not serve on {settings.host} without API keys.",
                    hint="Make one: `tokenfleet keys create NAME`.",
                )
            yield
        finally:
            await client.aclose()

    app = FastAPI(
        title="tokenfleet",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": documents.ERROR, "5XX": documents.ERROR},
    )
    errors.install(app)
    app.state.metrics = Metrics()
    app.add_middleware(Guard)
    app.add_middleware(Outermost)
    for part in (chat, responses, models, tokens, operations):
        app.include_router(part.router)
    return app
