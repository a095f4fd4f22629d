"""What stands around all routes: limits on a request's head, and the count of answers."""

from __future__ import annotations

from typing import Any

from tokenfleet.producer.gateway.errors import HeadTooLarge, error_response

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 * 1024
MAX_TARGET_BYTES = 8 * 1024


class Outermost:
    """Plain ASGI: a wrapper of Starlette's would handle every piece of a stream once more."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["app"].state

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                state.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES or target > MAX_TARGET_BYTES:
            told = f"At most {MAX_HEADERS} headers, {MAX_HEAD_BYTES} bytes, and {MAX_TARGET_BYTES} bytes of address."
            await error_response(HeadTooLarge(told))(scope, receive, counting)
            return
        await self._app(scope, receive, counting)
