"""``/v1/batches``: OpenAI's Batch API."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request

from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.batch_rows import ENDPOINTS
from tokenfleet.producer.gateway.batch_store import BatchStore, Fixed
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.files import id_of_key
from tokenfleet.producer.gateway.webhooks import KINDS, Hook, webhook_of
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.ledger import translated

router = APIRouter()

_FIELDS = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_WINDOW_S = 30 * 86400


@router.post("/v1/batches", openapi_extra=documents.BATCHES)
async def create(request: Request) -> dict[str, Any]:
    body = await read_body(request)
    url = await webhook_of(request, request.state.webhook)
    tenant, store = request.state.tenant, request.app.state.batches
    if unknown := sorted(set(body) - _FIELDS):
        raise InvalidRequest(f"Unknown field {unknown[0]!r}.", code="unknown_field", param=unknown[0])
    fixed = _fixed(body)
    key = request.headers.get("idempotency-key")
    batch_id = f"batch_{secrets.token_hex(16)}" if key is None else id_of_key("batch_", tenant, key)
    hook = msgspec.json.encode(Hook(url, tenant, KINDS["/v1/batches"])) if url else b""
    digest = hashlib.sha256(msgspec.json.encode(fixed) + hook).hexdigest()
    async with translated():
        file = await request.app.state.files.get(fixed.input_file_id, tenant)
        if file.purpose != "batch":
            raise InvalidRequest("input_file_id: a file with purpose 'batch' is needed.", param="input_file_id")
        await store.create(batch_id, tenant, fixed, digest, hook)
        request.app.state.batch_runner.wake()
        record = await store.get(batch_id, tenant)
    return record.shown()  # type: ignore[no-any-return]


@router.get("/v1/batches")
async def list_batches(
    request: Request, after: str | None = None, limit: int = Query(20, ge=1, le=100)
) -> dict[str, Any]:
    async with translated():
        records, has_more = await request.app.state.batches.page(request.state.tenant, after, limit)
    data = [record.shown() for record in records]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


@router.get("/v1/batches/{batch_id}")
async def retrieve(batch_id: str, request: Request) -> dict[str, Any]:
    async with translated():
        record = await request.app.state.batches.get(batch_id, request.state.tenant)
    return record.shown()  # type: ignore[no-any-return]


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
    """What has run stays; the rest ends with ``batch_cancelled``. An ended batch stays as it is."""
    store: BatchStore = request.app.state.batches
    async with translated():
        await store.get(batch_id, request.state.tenant)
        await store.cancel(batch_id)
        return (await store.get(batch_id, request.state.tenant)).shown()


def _fixed(body: dict[str, Any]) -> Fixed:
    """Raises `InvalidRequest`."""
    endpoint, file_id, window = (body.get(name) for name in ("endpoint", "input_file_id", "completion_window"))
    if endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint: one of {', '.join(sorted(ENDPOINTS))} is needed.", param="endpoint")
    if not isinstance(file_id, str):
        raise InvalidRequest("input_file_id: a file's id is needed.", param="input_file_id")
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", window) if isinstance(window, str) else None
    if match is None or (window_s := int(match[1]) * _UNITS_S[match[2]]) > _MAX_WINDOW_S:
        raise InvalidRequest("completion_window: e.g. '24h' is needed, at most '30d'.", param="completion_window")
    return Fixed(endpoint, file_id, str(window), window_s, _metadata(body), _output_expiry_s(body))


def _metadata(body: dict[str, Any]) -> dict[str, str] | None:
    metadata = body.get("metadata")
    if metadata is None:
        return None
    if not (
        isinstance(metadata, dict)
        and len(metadata) <= 16
        and all(isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in metadata.items())
    ):
        raise InvalidRequest("metadata: at most 16 strings of 512 characters, keys of 64.", param="metadata")
    return metadata


def _output_expiry_s(body: dict[str, Any]) -> float | None:
    wanted = body.get("output_expires_after")
    if wanted is None:
        return None
    seconds = wanted.get("seconds") if isinstance(wanted, dict) and wanted.get("anchor") == "created_at" else None
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 3600 <= seconds <= 30 * 86400:
        raise InvalidRequest(
            "output_expires_after: anchor 'created_at' and 3600 to 2592000 seconds are taken.",
            param="output_expires_after",
        )
    return float(seconds)
