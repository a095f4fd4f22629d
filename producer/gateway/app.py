"""The gateway's application: routes, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from tokenfleet import __version__
from tokenfleet.producer.aio import AsyncClient
from tokenfleet.producer.apikeys import KeyStore
from tokenfleet.producer.gateway import (
    batches,
    chat,
    documents,
    errors,
    files,
    models,
    operations,
    responses,
    stored_chats,
    tokens,
)
from tokenfleet.producer.gateway.batch_rows import RowClient, RowRunner, rows_app
from tokenfleet.producer.gateway.batch_runner import BatchRunner
from tokenfleet.producer.gateway.batch_store import BatchStore, Record
from tokenfleet.producer.gateway.file_store import FileStore
from tokenfleet.producer.gateway.guard import Guard
from tokenfleet.producer.gateway.metrics import Metrics
from tokenfleet.producer.gateway.outermost import Outermost
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.producer.gateway.storage import open_storage
from tokenfleet.producer.gateway.webhooks import WebhookRunner
from tokenfleet.producer.tenants import Tenants
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.media import MediaSettings

_WORK = (chat, responses, models)
"""What a row of a batch may ask for, too."""


def key_store(client: AsyncClient, settings: GatewaySettings) -> KeyStore:
    return KeyStore(client.ledger.client, client.keys, always=_needs_keys(settings))


async def check(client: AsyncClient, settings: GatewaySettings) -> None:
    """Raises `FleetUnavailable` for a Redis that can't hold a fleet, `ConfigurationError` for a public address without
    keys."""
    await client.check()
    if _needs_keys(settings) and not await key_store(client, settings).has_any():
        raise ConfigurationError(
            f"The gateway does not serve on {settings.host} without API keys.",
            hint="Make one: `tokenfleet keys create NAME`.",
        )


def _needs_keys(settings: GatewaySettings) -> bool:
    return not settings.is_loopback and not settings.allow_no_keys


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application for any ASGI server. Its start raises `ConfigurationError` for a public address without keys."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        media = MediaSettings(folder=settings.media_folder, max_bytes=settings.max_media_bytes)
        client = AsyncClient(settings.redis_url, fleet=settings.fleet, max_queued=settings.max_queued, media=media)
        app.state.client = client
        app.state.keys = key_store(client, settings)
        app.state.tenants = Tenants(client.ledger.client, client.keys)
        app.state.settings = settings
        try:
            await check(client, settings)
            async with _batches(app, client, settings, media):
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
    for part in (*_WORK, stored_chats, tokens, files, batches, operations):
        app.include_router(part.router)
    return app


@contextlib.asynccontextmanager
async def _batches(
    app: FastAPI, client: AsyncClient, settings: GatewaySettings, media: MediaSettings
) -> AsyncIterator[None]:
    """Files, batches and webhooks; batches are driven and webhooks delivered while the block runs."""
    redis, keys = client.ledger.client, client.keys
    storage = open_storage(settings.storage, settings.fleet)
    app.state.files = store = FileStore(redis, keys, storage, settings.max_stored_bytes)
    app.state.batches = BatchStore(redis, keys, lease_s=settings.batch_lease_s, retention_s=settings.batch_retention_s)
    most = settings.max_queued
    async with RowClient(settings.redis_url, fleet=settings.fleet, max_queued=most, media=media) as row_client:
        rows = rows_app(_WORK, row_client, app.state)

        def runner_of(batch: Record) -> RowRunner:
            return RowRunner(rows, batch.id, batch.tenant, batch.fixed.endpoint, batch.fixed.window_s)

        app.state.batch_runner = BatchRunner(app.state.batches, store, storage, row_client, settings, runner_of)
        webhooks = WebhookRunner(client.ledger, app.state.tenants, settings)
        running = [asyncio.create_task(app.state.batch_runner.run()), asyncio.create_task(webhooks.run())]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
