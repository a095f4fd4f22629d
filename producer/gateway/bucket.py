"""Files in a bucket: S3, Google's, Azure's, or what speaks like them (`obstore`). Credentials come as those services'
own clients take them: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ..."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from tokenfleet.producer.gateway.storage import PIECE_BYTES


class BucketStorage:
    """``url`` is ``s3://bucket/prefix``. Objects are written in parts of 8 MB, so memory stays bounded."""

    def __init__(self, url: str, **options: Any) -> None:
        self._store: Any = from_url(url, **options)

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        try:
            await obstore.put_async(self._store, name, counted(), chunk_size=8 * 1024 * 1024, max_concurrency=2)
        except BaseError as error:
            raise OSError(f"The storage failed: {type(error).__name__}") from error
        return size

    async def read(self, name: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        try:
            whole = await obstore.head_async(self._store, name)
            if start >= whole["size"]:
                return
            reply = await obstore.get_async(self._store, name, options={"range": {"offset": start}} if start else None)
            async for piece in reply.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)
        except BaseError as error:
            raise OSError(f"The storage failed: {type(error).__name__}") from error

    async def delete(self, name: str) -> None:
        try:
            await obstore.delete_async(self._store, name)
        except FileNotFoundError:
            pass
        except BaseError as error:
            raise OSError(f"The storage failed: {type(error).__name__}") from error

    async def delete_below(self, name: str) -> None:
        try:
            async for batch in obstore.list(self._store, prefix=f"{name}/"):
                await obstore.delete_async(self._store, [each["path"] for each in batch])
        except BaseError as error:
            raise OSError(f"The storage failed: {type(error).__name__}") from error
