"""tokenfleet's errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import Request, Response

from tokenfleet.wire.errors import InvalidRequest, Overloaded, TokenfleetError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class TooLarge(InvalidRequest):
    code = "request_too_large"
    http_status = 413


def error_object(error: TokenfleetError) -> dict[str, Any]:
    kind = _TYPES.get(error.http_status, "server_error")
    return {"message": str(error), "type": kind, "param": error.details.get("param") or None, "code": error.code}


def error_response(error: TokenfleetError) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    body = msgspec.json.encode({"error": error_object(error)})
    return Response(body, status_code=error.http_status, headers=headers, media_type="application/json")


async def on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TokenfleetError)
    return error_response(error)
