"""Request bodies: read no further than allowed, looked at before they are parsed, then parsed."""

from __future__ import annotations

import asyncio
import re
from itertools import accumulate
from typing import Any

import msgspec
from fastapi import Request

from tokenfleet.producer.gateway.errors import TooLarge, UnsupportedEncoding
from tokenfleet.producer.gateway.webhooks import KINDS
from tokenfleet.wire.errors import InvalidRequest

MAX_DEPTH = 64
MAX_CONTAINERS = 100_000
MAX_VALUES = 1_000_000
"""Commas, or quotes: beyond, even looking at it, let alone parsing, takes hundreds of megabytes."""
# Beyond this many bytes, parsing would hold up all other streams of the process for more than about a millisecond.
_INLINE_BYTES = 256 * 1024
# Possessive, and content with the end in place of the closing quote: linear for any input.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_OTHER = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def read_body(request: Request) -> dict[str, Any]:
    """The request's JSON object, never more of it than is allowed. Where a route takes a ``webhook``, that goes to
    ``request.state``: it is not the body's parser's.

    Raises `InvalidRequest` (``invalid_json``), `TooLarge`, `UnsupportedEncoding`."""
    body = await read_bytes(request, request.app.state.settings.max_body_bytes)
    value = parse_object(body) if len(body) <= _INLINE_BYTES else await asyncio.to_thread(parse_object, body)
    if request.scope["path"] in KINDS:
        request.state.webhook = value.pop("webhook", None)
    return value


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body as it is. Raises `TooLarge`, `UnsupportedEncoding`."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding("Bodies are taken without Content-Encoding.", hint="Send it uncompressed.")
    told = request.headers.get("content-length", "0")
    if not told.isascii() or not told.isdecimal() or len(told) > 15 or int(told) > limit:
        raise TooLarge(f"The body may have at most {limit} bytes.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise TooLarge(f"The body may have at most {limit} bytes.")
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises `InvalidRequest` (``invalid_json``)."""
    check_nesting(body)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return value


def check_nesting(body: bytes) -> None:
    """Refuse what is nested too deep, or in too many pieces, without parsing it."""
    if max(body.count(b","), body.count(b'"')) > MAX_VALUES:
        raise InvalidRequest(f"The body may have at most {MAX_VALUES} commas or quotes.", code="invalid_json")
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", body).translate(None, _OTHER)
    opened = brackets.count(b"[") + brackets.count(b"{")
    if opened > MAX_CONTAINERS:
        raise InvalidRequest(f"The body may have at most {MAX_CONTAINERS} objects and lists.", code="invalid_json")
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise InvalidRequest(f"The body may be nested at most {MAX_DEPTH} levels deep.", code="invalid_json")
