"""Before every route, known or not: whose request it is, and whether it may come in now."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenfleet.producer.gateway.errors import UnsupportedEncoding, error_response
from tokenfleet.producer.tenants import Rate
from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.wire.ledger import translated

# Health says nothing about anybody; all else needs a key once there are keys.
OPEN_PATHS = frozenset({"/health", "/ready"})


class Guard:
    """Deny by default. Sets ``request.state.tenant``, and the tenant's ``x-ratelimit-*`` on every answer.

    Only what asks for work (POST) counts against requests per minute."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        rate: Rate | None = None

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and rate is not None:
                told = await self._now(scope, rate)
                message = {**message, "headers": [*message.get("headers", ()), *told.headers()]}
            await send(message)

        try:
            async with translated():
                rate = await self._let_in(scope, HTTPConnection(scope))
            if rate is not None:
                rate.raise_if_refused()
        except TokenfleetError as error:
            scope["app"].state.metrics.refusals.labels("", error.code).inc()
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await error_response(error)(scope, receive, send_with_limits)
            return
        await self._app(scope, receive, send_with_limits if rate is not None else send)

    async def _now(self, scope: Scope, rate: Rate) -> Rate:
        """``rate`` with the tokens that the request itself has taken since: its job's submission takes them."""
        if scope.get("method") != "POST" or "tokens" not in rate.buckets or not rate.is_allowed:
            return rate
        with suppress(TokenfleetError):
            async with translated():
                return await scope["app"].state.tenants.take(scope["state"]["tenant"], 0) or rate
        return rate

    async def _let_in(self, scope: Scope, request: HTTPConnection) -> Rate | None:
        app: Any = scope["app"]
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["tenant"] = tenant = await app.state.keys.tenant_of(request.headers.get("authorization"))
        # Unpacking is what a decompression bomb needs.
        if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding("A compressed body is not taken.", hint="Send it as it is.")
        method = scope.get("method", "GET")
        rate: Rate | None = await app.state.tenants.take(tenant, int(method == "POST")) if tenant else None
        return rate
