"""What is small on the wire and large in memory, and names that lead inside: refused, in less than 200 MB."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.batches import ended, row
from tests.fleets import MODEL, Fleet
from tests.gateways import Gateway, start_gateway
from tests.receiver import receiver
from tokenfleet.producer.gateway.safe_fetch import SafeHttp, UrlRefused

MOST_BYTES = 200_000_000


@pytest.fixture(scope="module")
def gateway(served: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = start_gateway(served, storage=tmp_path_factory.mktemp("storage"), batch_lease_s=2)
    yield gateway
    gateway.close()


@pytest.fixture(autouse=True)
def _bounded(gateway: Gateway) -> Iterator[None]:
    """The most memory that the gateway ever had, whatever came."""
    yield
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    highest = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    assert highest < MOST_BYTES


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(gateway: Gateway, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Status and code. A refusal may come, and the connection end, before the whole body is sent."""
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        with contextlib.suppress(ConnectionError):
            connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text)["error"]["code"] if reply.status >= 400 else ""


@cache
def bomb() -> bytes:
    """500 MB of blanks, packed a thousandfold."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(b" " * 10_000_000) for _ in range(50)) + packer.flush()


def png(side: int) -> bytes:
    """Black, ``side`` x ``side`` pixels, packed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/batches", "/v1/files"])
def test_packed_bodies_are_not_unpacked(gateway: Gateway, path: str) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        assert post(gateway, path, bomb(), Content_Encoding=encoding) == (415, "unsupported_encoding")


def test_an_image_bomb_is_refused(gateway: Gateway) -> None:
    packed = base64.b64encode(png(12_000)).decode()
    for kind in ("png", "gif", "jpeg"):
        url = f"data:image/{kind};base64,{packed}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
        status, _ = post(gateway, "/v1/chat/completions", json.dumps(body).encode())
        assert 400 <= status < 500


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 8_000_000,
        b"[" * 100 + b"]" * 100,
        b'{"a":' * 1_000_000,
        b"[" + b"{}," * 2_000_000 + b"{}]",
        b'{"messages": [' + b'"",' * 7_000_000 + b'""]}',
        b'{"prompt": [' + b"1," * 9_000_000 + b"1]}",
    ],
    ids=["deep", "less deep", "deep objects", "many", "many strings", "many numbers"],
)
def test_nested_bodies_are_refused_unparsed(gateway: Gateway, body: bytes) -> None:
    assert post(gateway, "/v1/chat/completions", body) == (400, "invalid_json")


def test_a_large_upload_takes_little_memory(client: openai.OpenAI) -> None:
    rows = json.dumps(row("only")).encode() + b"\n" + b" " * 100_000_000
    file = client.files.create(file=("large.jsonl", rows), purpose="batch")
    assert file.bytes == len(rows)
    with client.files.with_streaming_response.content(file.id) as reply:
        assert sum(len(piece) for piece in reply.iter_bytes()) == len(rows)
    wanted = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = ended(client, client.batches.create(**wanted).id)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "line_too_long"
    client.files.delete(file.id)


def test_a_packed_file_is_only_bytes(client: openai.OpenAI) -> None:
    file = client.files.create(file=("rows.jsonl.gz", gzip.compress(b" " * 1_000_000)), purpose="batch")
    wanted = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert ended(client, client.batches.create(**wanted).id).errors.data[0].code == "invalid_json_line"


def test_forms_are_bounded(gateway: Gateway) -> None:
    def form(*parts: bytes) -> bytes:
        return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"

    field = b'Content-Disposition: form-data; name="%s"\r\n\r\n%s'
    file = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}'
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    purpose = field % (b"purpose", b"batch")
    assert post(gateway, "/v1/files", form(purpose, file), **kind)[0] == 200
    for body in (
        form(purpose, *[field % (b"k%d" % k, b"v") for k in range(1000)]),
        form(purpose, file, file),
        form(field % (b"purpose", b"x" * 1_000_000), file),
        form(purpose),
        form(file),
        form(purpose, field % (b"file", b"{}")),
        b"--x\r\n" + b"A" * 1_000_000,
        b"--y\r\n",
        b"",
    ):
        status, code = post(gateway, "/v1/files", body, **kind)
        assert (status, code) in [(400, "invalid_form"), (400, "invalid_request"), (413, "request_too_large")], body[
            :99
        ]
    assert post(gateway, "/v1/files", b"{}") == (400, "invalid_form")
    assert post(gateway, "/v1/files", b"", Content_Type="multipart/form-data")[0] == 400


def test_a_length_that_lies_is_refused(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_an_upload_that_breaks_off_leaves_nothing(gateway: Gateway, client: openai.OpenAI) -> None:
    before = [file.id for file in client.files.list()]
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n"
        line.sendall(head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Dispo")
    assert client.files.create(file=("a", b"{}"), purpose="batch").bytes == 2
    assert len([file.id for file in client.files.list()]) == len(before) + 1


class Resolver:
    """A name server of our own: each name's answers, one after the other, the last again and again."""

    def __init__(self, names: dict[str, list[list[str]]]) -> None:
        self.names = names
        self.asked: list[str] = []

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> Any:
        self.asked.append(host)
        answers = self.names[host.rstrip(".")]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]


@pytest.mark.parametrize("host", ["localhost", "localhost.",
                                  "127.0.0.1.nip.test", "inner.test", "v6.test", "mapped.test",
                                  "both.test", "metadata.test", "rebind.test"])  # fmt: skip
async def test_no_name_leads_a_webhook_inside(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.9 is allowed here, so that nothing leaves this machine; the canary listens at 127.0.0.1."""
    resolver = Resolver(
        {
            "localhost": [["127.0.0.1"]],
            "127.0.0.1.nip.test": [["127.0.0.1"]],
            "inner.test": [["10.0.0.8"]],
            "v6.test": [["::1"]],
            "mapped.test": [["::ffff:127.0.0.1"]],
            "both.test": [["127.0.0.9", "127.0.0.1"]],
            "metadata.test": [["169.254.169.254"]],
            "rebind.test": [["127.0.0.9"], ["127.0.0.1"]],
        }
    )
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolver.getaddrinfo)
    with receiver() as canary:
        safe = SafeHttp(["127.0.0.9/32"])
        # A name that rebinds: the one answer that was checked is called (nobody listens there), never the next one.
        first = pytest.raises(Exception) if host == "rebind.test" else pytest.raises(UrlRefused)
        with first:
            await safe.post(f"http://{host}:{canary.port}/", b"{}", {}, timeout_s=5)
        assert resolver.asked == [host]
        assert canary.calls == []
