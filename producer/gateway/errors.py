"""tokenfleet's errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokenfleet.wire.errors import CallerError, InvalidRequest, Overloaded, TokenfleetError

log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
}
_ROUTING = {404: ("route_not_found", "There is no such route."), 405: ("method_not_allowed", "Not with this method.")}


class TooLarge(InvalidRequest):
    code = "request_too_large"
    http_status = 413


class HeadTooLarge(InvalidRequest):
    code = "headers_too_large"
    http_status = 431


class UnsupportedEncoding(InvalidRequest):
    code = "unsupported_encoding"
    http_status = 415


class NotFound(CallerError):
    """Not there, or another tenant's: nobody can tell which."""

    code = "not_found"
    http_status = 404


def error_object(error: TokenfleetError) -> dict[str, Any]:
    kind = _TYPES.get(error.http_status, "server_error")
    return {"message": str(error), "type": kind, "param": error.details.get("param") or None, "code": error.code}


def error_response(error: TokenfleetError) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return _response(error_object(error), error.http_status, headers)


def install(app: FastAPI) -> None:
    """Every error that leaves the application has the one shape."""
    app.add_exception_handler(TokenfleetError, on_error)
    app.add_exception_handler(HTTPException, _on_routing)
    app.add_exception_handler(RequestValidationError, _on_parameter)
    app.add_exception_handler(ClientDisconnect, _on_leaving)
    app.add_exception_handler(Exception, _on_bug)


async def on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TokenfleetError)
    request.app.state.metrics.refusals.labels(getattr(request.state, "served_model", ""), error.code).inc()
    return error_response(error)


async def _on_routing(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    code, message = _ROUTING.get(status, ("http_error", str(error.detail)))
    body = {"message": message, "type": _TYPES.get(status, "server_error"), "param": None, "code": code}
    return _response(body, status, dict(error.headers or {}))


async def _on_leaving(_: Request, error: Exception) -> Response:
    """Whoever left before his body was whole reads no answer; it is no bug of ours."""
    return _response(
        {"message": "The client left.", "type": "server_error", "param": None, "code": "cancelled"}, 499, {}
    )


async def _on_parameter(request: Request, error: Exception) -> Response:
    """A query's or path's parameter of the wrong type."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await on_error(request, InvalidRequest(f"{name}: {first['msg']}.", param=name))


async def _on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: the log has it (never a body), the caller learns no more than that."""
    log.error("%s %s: %s", request.method, request.url.path, type(error).__name__, exc_info=error)
    return _response(
        {"message": "The gateway failed.", "type": "server_error", "param": None, "code": "internal_error"}, 500, {}
    )


def _response(error: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    body = msgspec.json.encode({"error": error})
    return Response(body, status_code=status, headers=headers, media_type="application/json")
