"""A batch's input file, line by line, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenfleet.producer.gateway.batch_rows import Row
from tokenfleet.producer.gateway.bodies import check_nesting
from tokenfleet.wire.errors import InvalidRequest

_MAX_ERRORS = 100
_MAX_CUSTOM_ID = 512
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """``end`` is the byte behind it; ``number`` counts lines that hold something, from 0."""

    number: int
    data: bytes
    end: int


class LineTooLong(Exception):
    pass


async def lines(
    pieces: AsyncIterator[bytes], max_bytes: int, *, number: int = 0, offset: int = 0
) -> AsyncGenerator[Line, None]:
    """Lines from ``offset`` on, where line ``number`` begins. Blank ones are passed over. Raises `LineTooLong`."""
    rest = bytearray()
    async for piece in pieces:
        begin = 0
        rest += piece
        while (at := rest.find(b"\n", begin)) >= 0:
            data, begin = bytes(rest[begin:at]), at + 1
            offset += len(data) + 1
            if len(data) > max_bytes:
                raise LineTooLong
            if data.strip():
                yield Line(number, _clean(data, number), offset)
                number += 1
        del rest[:begin]
        if len(rest) > max_bytes:
            raise LineTooLong
    if rest.strip():
        yield Line(number, _clean(bytes(rest), number), offset + len(rest))


def _clean(data: bytes, number: int) -> bytes:
    return (data.removeprefix(_BOM) if number == 0 else data).strip()


def parse(data: bytes) -> Row:
    """Raises `InvalidRequest` with what is wrong with the line itself; the request in it is the endpoint's to judge."""
    try:
        check_nesting(data)
        row = msgspec.json.decode(data, type=Row)
        data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRequest) as error:
        code = "invalid_row" if isinstance(error, msgspec.ValidationError) else "invalid_json_line"
        raise InvalidRequest(f"This line is not a valid request: {error}", code=code) from error
    if row.method != "POST":
        raise InvalidRequest("method: only POST is taken.", code="invalid_method", param="method")
    if not 1 <= len(row.custom_id) <= _MAX_CUSTOM_ID:
        raise InvalidRequest(f"custom_id: 1 to {_MAX_CUSTOM_ID} characters are needed.", code="invalid_custom_id")
    if not bytes(row.body).lstrip().startswith(b"{"):
        raise InvalidRequest("body: an object is needed.", code="invalid_row", param="body")
    return row


async def validate(
    pieces: AsyncIterator[bytes], endpoint: str, max_rows: int, max_line_bytes: int
) -> tuple[int, list[dict[str, Any]]]:
    """How many rows there are, and what is wrong with the file as a whole: with any such error none is run."""
    errors: list[dict[str, Any]] = []
    seen: set[bytes] = set()  # 16 bytes each: a hundred thousand are some megabytes
    total = 0

    def wrong(line: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"line": line, "code": code, "message": message, "param": param})

    try:
        async for line in lines(pieces, max_line_bytes):
            total = line.number + 1
            if total > max_rows:
                wrong(None, "too_many_requests", f"A batch may have at most {max_rows} requests.")
                break
            try:
                row = parse(line.data)
            except InvalidRequest as error:
                wrong(total, error.code, error.message, error.details.get("param"))
            else:
                key = hashlib.blake2b(row.custom_id.encode(), digest_size=16).digest()
                if key in seen:
                    wrong(total, "duplicate_custom_id", "This custom_id stands in an earlier line.", "custom_id")
                elif row.url != endpoint:
                    wrong(total, "mismatched_endpoint", f"The batch is for {endpoint}.", "url")
                seen.add(key)
            if len(errors) >= _MAX_ERRORS:
                break
    except LineTooLong:
        wrong(total + 1, "line_too_long", f"A line may have at most {max_line_bytes} bytes.")
    if not total and not errors:
        wrong(None, "empty_file", "The file has no requests.")
    return total, errors
