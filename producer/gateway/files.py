"""``/v1/files``: uploads for batches, and what batches wrote."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.errors import TooLarge
from tokenfleet.producer.gateway.file_store import FileStore, StoredFile, storage_translated
from tokenfleet.producer.gateway.storage import PIECE_BYTES
from tokenfleet.wire.errors import InvalidRequest, JobConflict
from tokenfleet.wire.ledger import translated

router = APIRouter()

_FORM_BYTES = 64 * 1024
"""What the form may have beside the file: boundaries, names, a few small fields."""
_MIN_EXPIRY_S, _MAX_EXPIRY_S = 3600, 30 * 86400


@router.post("/v1/files", openapi_extra=documents.FILES)
async def upload(request: Request) -> Response:
    settings, tenant = request.app.state.settings, request.state.tenant
    store: FileStore = request.app.state.files
    form = await _form(request, settings.max_file_bytes)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("file: a file is needed.", param="file")
        if purpose != "batch":
            raise InvalidRequest("purpose: only 'batch' is taken.", param="purpose")
        if (file.size or 0) > settings.max_file_bytes:
            raise TooLarge(f"A file may have at most {settings.max_file_bytes} bytes.")
        now = int(time.time())
        expires_at = now + _expiry_s(form, settings.file_expiry_s)
        key = request.headers.get("idempotency-key")
        file_id = f"file-{secrets.token_hex(16)}" if key is None else id_of_key("file-", tenant, key)
        digest = await _digest(file, purpose)
        async with translated(), storage_translated():
            name, size = await store.write(file_id, _pieces(file))
            filename = (file.filename or "upload.jsonl")[:255]
            wanted = StoredFile(file_id, tenant, filename, purpose, size, now, name, digest, expires_at)
            stored = await store.add(wanted)
    if stored.sha256 != digest:
        raise JobConflict("This Idempotency-Key was used with another file.", hint="Use a new key.")
    return JSONResponse(stored.shown())


@router.get("/v1/files")
async def list_files(
    request: Request,
    after: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    async with translated():
        files = await request.app.state.files.list(request.state.tenant)
    files = [file for file in files if purpose in (None, file.purpose)]
    return page([file.shown() for file in (files if order == "asc" else files[::-1])], after, limit)


@router.get("/v1/files/{file_id}")
async def retrieve(file_id: str, request: Request) -> dict[str, Any]:
    async with translated():
        file: StoredFile = await request.app.state.files.get(file_id, request.state.tenant)
    return file.shown()


@router.get("/v1/files/{file_id}/content")
async def content(file_id: str, request: Request) -> Response:
    store: FileStore = request.app.state.files
    async with translated():
        file = await store.get(file_id, request.state.tenant)
    pieces = store.read(file)
    async with storage_translated():  # before the head is sent
        first = await anext(pieces, b"")
    headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff",
               "Content-Disposition": "attachment"}  # fmt: skip
    return StreamingResponse(_after(first, pieces), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete(file_id: str, request: Request) -> dict[str, Any]:
    store: FileStore = request.app.state.files
    async with translated(), storage_translated():
        await store.get(file_id, request.state.tenant)
        await store.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """OpenAI's list, from the item behind ``after`` on. Raises `InvalidRequest`."""
    begin = 0
    if after is not None:
        begin = next((k + 1 for k, item in enumerate(items) if item["id"] == after), -1)
        if begin < 0:
            raise InvalidRequest("after: there is no such item in this list.", param="after")
    shown = items[begin : begin + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": begin + limit < len(items),
    }


def id_of_key(kind: str, tenant: str, key: str) -> str:
    """What an ``Idempotency-Key`` makes: the same of one tenant is the same id."""
    if len(key) > 256:
        raise InvalidRequest("Idempotency-Key: at most 256 characters.", param="Idempotency-Key")
    return kind + hashlib.sha256(f"{kind}\0{tenant}\0{key}".encode()).hexdigest()[:32]


async def _form(request: Request, max_bytes: int) -> FormData:
    """The form, read no further than allowed; a file larger than 1 MB waits on disk. Raises `TooLarge`."""
    most = max_bytes + _FORM_BYTES
    told = request.headers.get("content-length", "0")
    if not told.isascii() or not told.isdecimal() or len(told) > 15 or int(told) > most:
        raise TooLarge(f"A file may have at most {max_bytes} bytes.")
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("A form is needed: multipart/form-data.", code="invalid_form")
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > most:
            raise TooLarge(f"A file may have at most {max_bytes} bytes.")
        return message

    try:
        return await Request(request.scope, counted).form(max_files=1, max_fields=8, max_part_size=4096)
    except (HTTPException, UnicodeDecodeError) as error:
        raise InvalidRequest("The form can't be read.", code="invalid_form") from error


def _expiry_s(form: FormData, default_s: float) -> int:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return int(default_s)
    is_number = isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal() and len(seconds) < 9
    if anchor != "created_at" or not is_number or not _MIN_EXPIRY_S <= int(str(seconds)) <= _MAX_EXPIRY_S:
        raise InvalidRequest(
            f"expires_after: anchor 'created_at' and {_MIN_EXPIRY_S} to {_MAX_EXPIRY_S} seconds are taken.",
            param="expires_after",
        )
    return int(str(seconds))


async def _digest(file: UploadFile, purpose: str) -> str:
    whole = hashlib.sha256(f"{purpose}\0{file.filename}\0".encode(errors="replace"))
    async for piece in _pieces(file):
        await asyncio.to_thread(whole.update, piece)
    return whole.hexdigest()


async def _after(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    await file.seek(0)
    while piece := await file.read(PIECE_BYTES):
        yield piece
