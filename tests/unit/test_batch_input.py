"""A batch's input file is read line by line, whatever it holds, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfleet.producer.gateway.batch_input import lines, parse, validate
from tokenfleet.wire.errors import InvalidRequest

URL = "/v1/chat/completions"


def line(custom_id: Any, **more: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {}, **more}).encode()


async def cut(data: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@given(
    st.lists(st.sampled_from([b"", b" ", b"a", b"bb", b"c" * 50, b"\r"]), max_size=30),
    st.integers(1, 40),
    st.booleans(),
)
async def test_reading_goes_on_from_any_line(parts: list[bytes], size: int, is_closed: bool) -> None:
    data = b"\n".join(parts) + (b"\n" if is_closed else b"")
    whole = [each async for each in lines(cut(data, size), 100)]
    assert [each.data for each in whole] == [part.strip() for part in data.split(b"\n") if part.strip()]
    for k, each in enumerate(whole):
        rest = lines(cut(data[each.end :], size), 100, number=k + 1, offset=each.end)
        assert [later async for later in rest] == whole[k + 1 :]


@given(st.binary(max_size=200))
async def test_no_bytes_break_it(data: bytes) -> None:
    total, errors = await validate(cut(data, 7), URL, 100, 1000)
    assert errors
    assert total >= 0
    with pytest.raises(InvalidRequest) as caught:
        parse(data)
    assert caught.value.code in ("invalid_json_line", "invalid_row", "invalid_method", "invalid_custom_id")


async def test_a_byte_order_mark_and_windows_lines_are_taken() -> None:
    data = b"\xef\xbb\xbf" + line("a") + b"\r\n" + line("b") + b"\r\n"
    assert await validate(cut(data, 10), URL, 100, 1000) == (2, [])


async def test_limits_are_told() -> None:
    rows = b"\n".join(line(str(k)) for k in range(5))
    assert (await validate(cut(rows, 64), URL, 4, 1000))[1][0]["code"] == "too_many_requests"
    assert (await validate(cut(b"x" * 5000, 64), URL, 4, 1000))[1][0]["code"] == "line_too_long"
    _, errors = await validate(cut(b"x\n" * 1000, 64), URL, 10_000, 1000)
    assert len(errors) == 100


async def test_many_rows_take_little_memory() -> None:
    async def many() -> AsyncIterator[bytes]:
        for k in range(10_000):
            yield line(f"row-{k}", body={"x": "y" * 100}) + b"\n"

    tracemalloc.start()
    try:
        assert await validate(many(), URL, 10_000, 1000) == (10_000, [])
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
