"""Request bodies: read no further than allowed, then parsed."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request

from tokenfleet.producer.gateway.errors import TooLarge
from tokenfleet.wire.errors import InvalidRequest


async def read_body(request: Request) -> dict[str, Any]:
    """The request's JSON object, never more of it than is allowed. Raises `InvalidRequest`, `TooLarge`."""
    limit = request.app.state.settings.max_body_bytes
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told) > limit:
        raise TooLarge(f"The body may have at most {limit} bytes.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise TooLarge(f"The body may have at most {limit} bytes.")
    try:
        value = msgspec.json.decode(bytes(body))
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return value
